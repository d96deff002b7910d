"""A judge on a server with OpenAI's protocol, which runs in a thread, and a local one against its model's own pass."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_env.models.load import build_model
from distill_env.models.toy import toy_tokenizer
from experiments import judge
from experiments.answering.judges import LocalJudge, LocalJudgeConfig, read_verdict
from experiments.answering.judging import combine
from experiments.running.completions_file import FILE, read_lines
from tests.helpers.paths import REPOSITORY

KEY = "sk-a-key-that-nobody-may-see"
PAIRS = [
    {"prompt": f"question {i}", "completion_a": "word " * a, "completion_b": "other " * b}
    for i, a, b in [(0, 3, 1), (1, 4, 2), (1, 1, 3), (2, 5, 1), (2, 2, 9), (2, 8, 6)]
]

Behaviour = Callable[[str, int], tuple[int, Any]]
"""The text of a request and how many came before -> status (0: no answer) and the reply, or a body in its place."""


class Server(ThreadingHTTPServer):
    """Replies by its behaviour; `requests` and `keys` are what it received."""

    daemon_threads = True

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour = behaviour
        self.requests: list[str] = []
        self.keys: set[str] = set()
        self.over = threading.Event()

    def handle_error(self, *_: Any) -> None:
        """A client that stops hangs up."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, before = request["messages"][0]["content"], len(self.server.requests)
        self.server.requests.append(text)
        self.server.keys.add(self.headers["Authorization"])
        status, body = self.server.behaviour(text, before)
        if status == 0:
            self.server.over.wait()
            return
        if isinstance(body, str):
            choice = {"index": 0, "message": {"role": "assistant", "content": body}, "finish_reason": "stop"}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", len(data)), ("retry-after-ms", 1)):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


Serve = Callable[[Behaviour], Server]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    servers = []

    def start(behaviour: Behaviour) -> Server:
        server = Server(behaviour)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        return server

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


def write_pairs(path: Path, pairs: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl", PAIRS)


def ask(pairs: Path, *flags: object) -> int:
    summary = str(pairs.with_name("s.json"))
    return judge.main(["api", str(pairs), "--model", "m", "--summary", summary, *map(str, flags)])


def summary(pairs: Path) -> dict[str, Any]:
    assert ask(pairs) == 0
    return dict(json.loads(pairs.with_name("s.json").read_text()))


def verdicts(pairs: Path) -> list[dict[str, Any]]:
    return read_lines(pairs.with_suffix(".verdicts.jsonl"), "out", ())


def one_line(capfd: pytest.CaptureFixture[str], name: str) -> str:
    """The error, which is one line that begins with the argument's name."""
    error = capfd.readouterr().err
    assert error.startswith(f"error: {name}: ")
    assert error.count("\n") == 1
    return error


def prefer_longer(text: str, _: int) -> tuple[int, str]:
    first, second = (
        text.split(f"[Assistant {x}'s answer]\n")[1].split(f"\n[The end of assistant {x}")[0] for x in "AB"
    )
    return 200, "Quite long. [[A]]" if len(first) > len(second) else "[[A]]? No: [[B]]"


def prefer_first(_: str, __: int) -> tuple[int, str]:
    return 200, "[[A]]"


def test_a_judge_that_prefers_the_longer_completion(serve: Serve, pairs: Path) -> None:
    """a wins the one pair of the first prompt, one of two of the next and two of three of the last; b mirrors a."""
    server = serve(prefer_longer)
    result = summary(pairs)
    rate = result["win_rate"]
    assert rate["value"] == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)
    assert rate["low"] < rate["value"] < rate["high"]
    assert [result[k] for k in ("wins_a", "wins_b", "ties", "unjudged")] == [4, 2, 0, 0]
    assert (result["consistent"], result["first"]) == (1, 0.5)
    assert len(server.requests) == 12
    swapped = [p | {"completion_a": p["completion_b"], "completion_b": p["completion_a"]} for p in PAIRS]
    mirrored = summary(write_pairs(pairs.with_name("swapped.jsonl"), swapped))
    assert mirrored["win_rate"]["value"] == pytest.approx(1 - rate["value"])


def test_a_judge_that_prefers_a_position_decides_nothing(serve: Serve, pairs: Path) -> None:
    serve(prefer_first)
    result = summary(pairs)
    assert result["win_rate"]["value"] == 0.5
    assert (result["ties"], result["consistent"], result["first"]) == (6, 0, 1)


def test_equal_completions_tie_and_are_judged_once(serve: Serve, tmp_path: Path) -> None:
    server = serve(prefer_first)
    path = write_pairs(tmp_path / "pairs.jsonl", [{"prompt": "p", "completion_a": "x", "completion_b": "x"}])
    assert (summary(path)["ties"], len(server.requests)) == (1, 1)


def test_a_judge_that_hangs_ends_in_one_line_and_the_same_command_continues(
    serve: Serve, pairs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its verdicts so far are stored, and not asked for again."""
    serve(lambda text, before: prefer_longer(text, before) if before < 5 else (0, ""))
    assert ask(pairs, "--timeout", 0.3, "--retries", 0, "--concurrency", 1) == 1
    assert "5 of 12" in one_line(capfd, "timeout")
    stored = verdicts(pairs)
    assert len(stored) == 5
    with pairs.with_suffix(".verdicts.jsonl").open("a") as file:
        file.write('{"judge": "api:m", "ke')  # as a kill may leave it
    server = serve(prefer_longer)
    assert summary(pairs)["consistent"] == 1
    assert len(server.requests) == 7
    assert verdicts(pairs)[:5] == stored
    assert len({v["key"] for v in verdicts(pairs)}) == len(verdicts(pairs)) == 12
    assert ask(pairs) == 0
    assert len(server.requests) == 7  # nothing is left to ask


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
def test_a_signal_leaves_the_verdicts_so_far(serve: Serve, pairs: Path) -> None:
    def behaviour(text: str, before: int) -> tuple[int, str]:
        if before < 5:
            return prefer_longer(text, before)
        os.kill(os.getpid(), signal.SIGTERM)
        return 0, ""

    serve(behaviour)
    assert ask(pairs, "--concurrency", 1) == 143
    assert len(verdicts(pairs)) == 5


def test_other_verdicts_are_not_mixed_in(serve: Serve, pairs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    serve(prefer_longer)
    assert ask(pairs) == 0
    assert judge.main(["api", str(pairs), "--model", "another"]) == 1
    one_line(capfd, "out")
    write_pairs(pairs, PAIRS[:1])
    assert ask(pairs) == 1
    one_line(capfd, "out")


GARBAGE: dict[str, tuple[int, Any]] = {
    "no verdict": (200, "I cannot decide between [[D]] and [A]."),
    "no text": (200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": None}}]}),
    "no choices": (200, {"choices": []}),
    "another object": (200, {"hello": "world"}),
    "a list": (200, [1, 2]),
    "not JSON": (200, b"<html>"),
    "nothing": (200, b""),
    "rejected": (400, {"error": {"message": "context_length_exceeded"}}),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_no_verdict(
    serve: Serve, pairs: Path, capfd: pytest.CaptureFixture[str], garbage: tuple[int, Any]
) -> None:
    """Garbage alone is an error; a pair of garbage is counted as unjudged, and asked about again."""
    serve(lambda *_: garbage)
    assert ask(pairs) == 1
    one_line(capfd, "model")
    serve(lambda text, before: garbage if "question 2" in text else prefer_longer(text, before))
    assert summary(pairs)["unjudged"] == 3
    server = serve(prefer_longer)
    assert summary(pairs)["unjudged"] == 0
    assert len(server.requests) == 6


@pytest.mark.parametrize(("status", "name"), [(401, "key_variable"), (404, "model"), (500, "model")])
def test_errors_of_a_server_are_one_line_without_the_key(
    serve: Serve, pairs: Path, capfd: pytest.CaptureFixture[str], status: int, name: str
) -> None:
    """The server repeats the key in its message."""
    server = serve(lambda *_: (status, {"error": {"message": f"wrong key {KEY}\nreally"}}))
    assert ask(pairs, "--retries", 0) == 1
    error = one_line(capfd, name)
    assert f"http://127.0.0.1:{server.server_port}" in error
    assert KEY not in error


def test_the_key_is_sent_and_written_nowhere(serve: Serve, pairs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Even if the judge repeats it."""
    server = serve(lambda _, before: (200, f"{KEY} [[A]]") if before % 2 else (400, {"error": {"message": KEY}}))
    assert ask(pairs, "--concurrency", 1) == 1
    assert server.keys == {f"Bearer {KEY}"}
    output = capfd.readouterr()
    files = "".join(p.read_text() for p in pairs.parent.iterdir())
    assert "[the key]" in files
    assert KEY not in output.out + output.err + files


def test_passing_errors_are_retried(serve: Serve, pairs: Path) -> None:
    """Every other request fails, with an error of the server or too many requests."""
    status = iter([500, 429] * 6)
    server = serve(lambda text, before: prefer_longer(text, before) if before % 2 else (next(status), {"error": {}}))
    assert ask(pairs, "--concurrency", 1, "--retries", 1) == 0
    assert len(server.requests) == 24


def test_no_server_is_one_line(pairs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as gone:
        url = f"http://user:secret@127.0.0.1:{gone.server_port}/v1"
    assert ask(pairs, "--base-url", url, "--key-variable", "", "--retries", 0) == 1
    assert "secret" not in one_line(capfd, "base_url")


INVALID = [
    ("key_variable", "OPENAI_API_KEY", ""),
    ("key_variable", "OPENAI_API_KEY", "sk-two\nlines"),
    ("base_url", "localhost:8000", KEY),
    ("base_url", "http://[::1", KEY),
    ("timeout", "nan", KEY),
    ("concurrency", "0", KEY),
    ("retries", "-1", KEY),
]


@pytest.mark.parametrize(("name", "value", "key"), INVALID)
def test_invalid_flags_are_one_line(
    pairs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str, value: str, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert ask(pairs, f"--{name.replace('_', '-')}", value) == 1
    error = one_line(capfd, name)
    assert not key or key not in error


UNREADABLE = {
    "nothing": (b"", ""),
    "not text": (b"\xff\xfe", ""),
    "not JSON": (b"{", "line 1"),
    "too deep": (b"[" * 100_000, "line 1"),
    "no text": (b'\n{"prompt": "p", "completion_a": 1, "completion_b": ""}', "line 2"),
}


@pytest.mark.parametrize(("content", "line"), UNREADABLE.values(), ids=UNREADABLE)
def test_pairs_that_cannot_be_read(
    pairs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], content: bytes, line: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    pairs.write_bytes(content)
    assert ask(pairs) == 1
    assert line in one_line(capfd, "pairs")


LAST = {"[[A]]": "first", "A says [[A]], but\n[[B]].": "second", "[[ c ]]": "tie", "[[Tie]]": "tie", "[A] [[AB]]": None}


@pytest.mark.parametrize(("text", "verdict"), LAST.items())
def test_the_last_verdict_counts(text: str, verdict: str | None) -> None:
    assert read_verdict(text) == verdict


@pytest.mark.parametrize("ab", ["a", "b", "tie"])
@pytest.mark.parametrize("ba", ["a", "b", "tie"])
def test_only_agreement_wins(ab: Any, ba: Any) -> None:
    assert combine(ab, ba) == (ab if ab == ba else "tie")


@pytest.fixture(scope="module")
def small_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of Sums with its tokenizer, which knows digits but no words."""
    folder = tmp_path_factory.mktemp("judge")
    build_model("sums").save_pretrained(folder)
    toy_tokenizer("sums").save_pretrained(folder)
    return folder


def test_a_local_judge_compares_the_log_probabilities_of_the_verdicts(small_judge: Path) -> None:
    """Against one pass of the model over the request and a verdict of several tokens."""
    local = LocalJudge(LocalJudgeConfig(str(small_judge)))
    local._verdicts = {"first": [7, 7], "second": [7, 2, 13], "tie": [2]}
    ids = [7, 10, 2, 11]
    log_probs = local.log_probs(ids)
    for verdict, tokens in local._verdicts.items():
        with torch.no_grad():
            rows = build_model("sums").model(input_ids=torch.tensor([[*ids, *tokens]])).logits[0].log_softmax(-1)
        expected = sum(float(rows[len(ids) - 1 + i, t]) for i, t in enumerate(tokens))
        assert log_probs[verdict] == pytest.approx(expected, rel=1e-4)
    assert local.log_probs(ids) == log_probs


def test_a_request_longer_than_a_local_judge_reads(
    small_judge: Path, pairs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """This judge reads 64 tokens."""
    assert judge.main(["local", str(pairs), "--model", str(small_judge)]) == 1
    assert "64" in one_line(capfd, "model")


def test_pairs_of_two_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By prompt and number; a completion without a partner is counted."""

    def write(run: str, *completions: str) -> None:
        (tmp_path / run).mkdir()
        lines = (dict(zip(("split", "writer", "prompt", "completion"), c.split(), strict=True)) for c in completions)
        (tmp_path / run / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))

    write("a", "test student p a1", "test student p a2", "test student q a3", "ood student p a4", "test teacher p t1")
    write("b", "test student p b1", "test student p b2")
    runs, out = [str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "pairs.jsonl"

    def make(*flags: str) -> list[tuple[str, str, str]]:
        assert judge.main(["pairs", *runs, "--out", str(out), *flags]) == 0
        return [tuple(line.values()) for line in read_lines(out, "pairs", ())]  # type: ignore[misc]

    assert make() == [("p", "a1", "b1")]
    assert " 1 pairs " in (output := capfd.readouterr().out)
    assert " 1 completions " in output
    assert make("--samples", "2") == [("p", "a1", "b1"), ("p", "a2", "b2")]
    assert make("--writer-a", "teacher") == [("p", "t1", "b1")]
    capfd.readouterr()
    assert judge.main(["pairs", *runs, "--writer-b", "reference", "--out", str(out)]) == 1
    one_line(capfd, "writer_b")
    (tmp_path / "b" / FILE).unlink()
    assert judge.main(["pairs", *runs, "--out", str(out)]) == 1
    one_line(capfd, "b")


def test_help_is_light() -> None:
    code = (
        "import sys, experiments.judge as j\ntry: j.main(['api', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'openai', 'sacrebleu'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.splitlines()[-1] == "[]"
