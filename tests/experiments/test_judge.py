"""A judge against a server that speaks OpenAI's protocol in a thread, and a local one against the model's own pass."""

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
from hypothesis import given
from hypothesis import strategies as st

from distill_env.models.hub import load_tokenizer
from distill_env.models.load import build_model
from distill_env.models.toy import toy_tokenizer
from experiments import judge
from experiments.answering.judges import LocalJudge, read_verdict
from experiments.running.completions_file import read_lines
from tests.helpers.paths import REPOSITORY

KEY = "sk-a-key-that-nobody-may-see"
PAIRS = [
    {"prompt": f"question {i}", "answer_a": "word " * a, "answer_b": "other " * b}
    for i, a, b in [(0, 3, 1), (1, 4, 2), (1, 1, 3), (2, 5, 1), (2, 2, 9), (2, 8, 6)]
]

Behaviour = Callable[[str, int], tuple[int, Any]]
"""The text of a question and how many came before -> status and the reply, or what stands in place of a completion."""


class Server(ThreadingHTTPServer):
    """Answers as it is told; `questions` and `keys` are what it was sent."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that was told enough hangs up."""

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour = behaviour
        self.questions: list[str] = []
        self.keys: set[str] = set()
        self.over = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = sent["messages"][0]["content"]
        before = len(self.server.questions)
        self.server.questions.append(text)
        self.server.keys.add(self.headers["Authorization"])
        status, said = self.server.behaviour(text, before)
        if status == 0:
            self.server.over.wait()  # hangs until the test has ended
            return
        body = said
        if isinstance(said, str):
            message = {"role": "assistant", "content": said}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": sent["model"], "choices": [choice]}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour], Server]]:
    servers = []

    def start(behaviour: Behaviour) -> Server:
        server = Server(behaviour)
        servers.append((server, threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})))
        servers[-1][1].start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        return server

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield start
    for server, thread in servers:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    return path


def ask(pairs: Path, *flags: object) -> int:
    return judge.main(
        ["api", str(pairs), "--model", "m", "--summary", str(pairs.with_name("s.json")), *map(str, flags)]
    )


def summary(pairs: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(pairs.with_name("s.json").read_text())
    return found


def verdicts(pairs: Path) -> list[dict[str, Any]]:
    return read_lines(pairs.with_suffix(".verdicts.jsonl"), "out", ())


def answers_of(text: str) -> tuple[str, str]:
    first, second = (
        text.split(f"[Assistant {x}'s answer]\n")[1].split(f"\n[The end of assistant {x}")[0] for x in "AB"
    )
    return first, second


def longer(text: str, _: int) -> tuple[int, str]:
    first, second = answers_of(text)
    return 200, "Quite long. [[A]]" if len(first) > len(second) else "[[A]]? No: [[B]]"


def first(_: str, __: int) -> tuple[int, str]:
    return 200, "[[A]]"


def test_a_judge_that_prefers_the_longer_answer(serve: Callable[[Behaviour], Server], pairs: Path) -> None:
    """Won to the one prompt, won and lost to the next, won, lost and won to the last."""
    server = serve(longer)
    assert ask(pairs) == 0
    found = summary(pairs)
    assert found["win_rate"]["value"] == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)
    assert found["win_rate"]["low"] < found["win_rate"]["value"] < found["win_rate"]["high"]
    assert (found["wins_a"], found["wins_b"], found["ties"]) == (4, 2, 0)
    assert (found["consistent"], found["first"], found["unjudged"]) == (1, 0.5, 0)
    assert len(server.questions) == 12


def test_a_judge_that_prefers_a_position_decides_nothing(serve: Callable[[Behaviour], Server], pairs: Path) -> None:
    serve(first)
    assert ask(pairs) == 0
    found = summary(pairs)
    assert found["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert (found["ties"], found["consistent"], found["first"]) == (6, 0, 1)


def test_equal_answers_tie_whatever_the_judge_says(serve: Callable[[Behaviour], Server], tmp_path: Path) -> None:
    """One question a pair, for both orders are the same words."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer_a": "x", "answer_b": "x"}) + "\n")
    server = serve(first)
    assert ask(path) == 0
    assert (summary(path)["ties"], len(server.questions)) == (1, 1)


def test_swapping_the_answers_mirrors_the_win_rate(serve: Callable[[Behaviour], Server], pairs: Path) -> None:
    serve(longer)
    assert ask(pairs) == 0
    swapped = pairs.with_name("swapped.jsonl")
    turned = [{"prompt": p["prompt"], "answer_a": p["answer_b"], "answer_b": p["answer_a"]} for p in PAIRS]
    swapped.write_text("".join(json.dumps(p) + "\n" for p in turned))
    value = summary(pairs)["win_rate"]["value"]
    assert ask(swapped) == 0
    assert summary(swapped)["win_rate"]["value"] == pytest.approx(1 - value)


def test_a_judge_that_hangs_ends_in_one_line_and_the_same_command_goes_on(
    serve: Callable[[Behaviour], Server], pairs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it said before is kept, and not asked for again."""
    serve(lambda text, before: longer(text, before) if before < 5 else (0, ""))
    assert ask(pairs, "--timeout", 0.3, "--retries", 0, "--concurrency", 1) == 1
    error = capfd.readouterr().err
    assert error.startswith("error timeout: http://127.0.0.1:")
    assert error.count("\n") == 1
    assert "did not answer within 0.3 s; 5 of 12 verdicts are in" in error
    kept = verdicts(pairs)
    assert len(kept) == 5
    with pairs.with_suffix(".verdicts.jsonl").open("a") as file:
        file.write('{"judge": "api:m", "ke')  # as a kill may leave it
    server = serve(longer)
    assert ask(pairs) == 0
    assert len(server.questions) == 7
    assert verdicts(pairs)[:5] == kept
    assert len(verdicts(pairs)) == 12
    assert len({v["key"] for v in verdicts(pairs)}) == 12
    assert summary(pairs)["consistent"] == 1
    assert ask(pairs) == 0
    assert len(server.questions) == 7  # nothing is left to ask


def test_other_verdicts_are_not_mixed_in(
    serve: Callable[[Behaviour], Server], pairs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    serve(longer)
    out = pairs.with_suffix(".verdicts.jsonl")
    assert ask(pairs) == 0
    assert judge.main(["api", str(pairs), "--model", "another"]) == 1
    assert "holds verdicts of api:m; accepted: another --out" in capfd.readouterr().err
    pairs.write_text(json.dumps(PAIRS[0]) + "\n")
    assert judge.main(["api", str(pairs), "--model", "m"]) == 1
    assert f"error out: {str(out)!r} holds verdicts on other pairs" in capfd.readouterr().err


GARBAGE: dict[str, tuple[int, Any]] = {
    "no verdict": (200, "I cannot decide between [[D]] and [A]."),
    "no text": (200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": None}}]}),
    "no choices": (200, {"choices": []}),
    "another object": (200, {"hello": "world"}),
    "a list": (200, [1, 2]),
    "not JSON": (200, b"<html>"),
    "nothing": (200, b""),
    "refused": (400, {"error": {"message": "context_length_exceeded"}}),
}


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_no_verdict(
    serve: Callable[[Behaviour], Server], pairs: Path, capfd: pytest.CaptureFixture[str], said: tuple[int, Any]
) -> None:
    """One pair of garbage is left out and told; nothing but garbage is an error; what is missing is asked for again."""
    serve(lambda *_: said)
    assert ask(pairs) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "12 replies of api:m hold no verdict" in error
    serve(lambda text, before: said if "question 2" in text else longer(text, before))
    assert ask(pairs) == 0
    assert summary(pairs)["unjudged"] == 3
    assert "pairs without a verdict" in capfd.readouterr().out
    server = serve(longer)
    assert ask(pairs) == 0
    assert summary(pairs)["unjudged"] == 0
    assert len(server.questions) == 6


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
def test_a_signal_keeps_what_was_said(serve: Callable[[Behaviour], Server], pairs: Path) -> None:
    def behaviour(text: str, before: int) -> tuple[int, str]:
        if before < 5:
            return longer(text, before)
        os.kill(os.getpid(), signal.SIGTERM)
        return 0, ""

    serve(behaviour)
    assert ask(pairs, "--concurrency", 1) == 143
    assert len(verdicts(pairs)) == 5
    server = serve(longer)
    assert ask(pairs) == 0
    assert len(server.questions) == 7


ERRORS: dict[str, tuple[int, str]] = {
    "unauthorised": (401, "key_variable: http://127.0.0.1:{port} refuses the key of $OPENAI_API_KEY"),
    "no such model": (404, "model: http://127.0.0.1:{port} answers 'm' with an error 404"),
    "broken": (500, "model: http://127.0.0.1:{port} answers 'm' with an error 500"),
}


@pytest.mark.parametrize(("status", "line"), ERRORS.values(), ids=ERRORS)
def test_errors_of_a_server_are_one_line_without_the_key(
    serve: Callable[[Behaviour], Server], pairs: Path, capfd: pytest.CaptureFixture[str], status: int, line: str
) -> None:
    """The server repeats the key in what it says."""
    server = serve(lambda *_: (status, {"error": {"message": f"wrong key {KEY}\nreally"}}))
    assert ask(pairs, "--retries", 0) == 1
    said = capfd.readouterr()
    assert f"error {line.format(port=server.server_port)}" in said.err
    assert said.err.count("\n") == 1
    assert KEY not in said.err + said.out


def test_the_key_is_sent_and_stands_nowhere(
    serve: Callable[[Behaviour], Server], pairs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A judge that repeats it, too."""
    server = serve(lambda text, before: (200, f"{KEY} [[A]]") if before % 2 else (400, {"error": {"message": KEY}}))
    assert ask(pairs, "--concurrency", 1) == 1
    assert server.keys == {f"Bearer {KEY}"}
    said = capfd.readouterr()
    assert KEY not in said.out + said.err
    files = [p.read_text() for p in pairs.parent.iterdir()]
    assert any("[the key]" in text for text in files)
    assert not any(KEY in text for text in files)


def test_what_can_pass_is_tried_again(serve: Callable[[Behaviour], Server], pairs: Path) -> None:
    """Every other request fails, with an error of the server or too many requests."""
    status = iter([500, 429] * 6)
    server = serve(lambda text, before: longer(text, before) if before % 2 else (next(status), {"error": {}}))
    assert ask(pairs, "--concurrency", 1, "--retries", 1) == 0
    assert len(server.questions) == 24


def test_no_server_is_one_line(pairs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as gone:
        port = gone.server_port
    flags = ["--base-url", f"http://user:secret@127.0.0.1:{port}/v1", "--key-variable", "", "--retries", 0]
    assert ask(pairs, *flags) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error base_url: http://127.0.0.1:{port} cannot be reached (")
    assert error.count("\n") == 1
    assert "secret" not in error


@pytest.mark.parametrize(
    ("flags", "variable", "line"),
    [
        ([], "", "key_variable: $OPENAI_API_KEY is not set"),
        ([], "sk-two\nlines", "key_variable: $OPENAI_API_KEY holds what cannot be a key"),
        (["--base-url", "localhost:8000"], KEY, "base_url: this is no address; accepted: such as"),
        (["--base-url", "http://[::1"], KEY, "base_url: this is no address; accepted: such as"),
        (["--timeout", "0"], KEY, "timeout: 0.0; accepted: at least 0.001"),
        (["--timeout", "nan"], KEY, "timeout: nan; accepted: at least 0.001"),
        (["--concurrency", "0"], KEY, "concurrency: 0; accepted: at least 1"),
        (["--retries", "-1"], KEY, "retries: -1; accepted: at least 0"),
    ],
)
def test_flags_that_cannot_be(
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    flags: list[str],
    variable: str,
    line: str,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", variable)
    assert ask(pairs, *flags) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error {line}")
    assert error.count("\n") == 1
    assert not variable or variable not in error


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "is empty; accepted: an object a line"),
        (b"\xff\xfe", "cannot be read (not UTF-8 text)"),
        (b"{", "line 1 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"[1]", "line 1 has no text 'prompt'"),
        (b'\n{"prompt": "p", "answer_a": 1, "answer_b": ""}', "line 2 has no text 'answer_a'"),
    ],
)
def test_pairs_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], content: bytes, line: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    assert ask(path) == 1
    error = capfd.readouterr().err
    assert error.startswith("error pairs: ")
    assert line in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", "first"),
        ("A says [[A]], but\n[[B]].", "second"),
        ("[[ c ]]", "tie"),
        ("[[Tie]]", "tie"),
        ("[A] [[AB]] [[ ]]", None),
        ("", None),
    ],
)
def test_the_last_verdict_counts(text: str, verdict: str | None) -> None:
    assert read_verdict(text) == verdict


@given(st.sampled_from(["a", "b", "tie"]), st.sampled_from(["a", "b", "tie"]))
def test_only_agreement_wins(ab: judge.Winner, ba: judge.Winner) -> None:
    assert judge.combine(ab, ba) == judge.combine(ba, ab)
    assert (judge.combine(ab, ba) == "tie") == (ab != ba or ab == "tie")


@pytest.fixture(scope="module")
def small_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of Sums with its tokenizer. Words are unknown to it, but not digits."""
    folder = tmp_path_factory.mktemp("judge")
    build_model("sums").save_pretrained(folder)
    toy_tokenizer("sums").save_pretrained(folder)
    return folder


def test_a_local_judge_compares_what_its_model_thinks_of_the_verdicts(small_judge: Path) -> None:
    """Against the model's own pass over prompt and verdict, of several tokens each."""
    local = LocalJudge(str(small_judge))
    local._verdicts = {"first": [7, 7], "second": [7, 2, 13], "tie": [2]}
    ids = [7, 10, 2, 11]
    found = local.log_probs(ids)
    for verdict, tokens in local._verdicts.items():
        whole = torch.tensor([[*ids, *tokens]])
        with torch.no_grad():
            rows = build_model("sums").model(input_ids=whole).logits[0].log_softmax(-1)
        expected = sum(float(rows[len(ids) - 1 + i, t]) for i, t in enumerate(tokens))
        assert found[verdict] == pytest.approx(expected, rel=1e-4)
    assert local.log_probs(ids) == found


def test_a_local_judge_says_what_is_too_long(
    small_judge: Path, pairs: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words of a request exceed the 64 tokens of this judge."""
    assert load_tokenizer(str(small_judge)).chat_template is None
    assert judge.main(["local", str(pairs), "--model", str(small_judge)]) == 1
    error = capfd.readouterr().err
    assert "hold no verdict; the last: 'too long: " in error
    assert "tokens; the judge reads 64'" in error


def answer(writer: str, prompt: str, text: str, split: str = "test") -> str:
    return json.dumps({"split": split, "writer": writer, "prompt": prompt, "answer": text}) + "\n"


def test_pairs_of_two_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By prompt and number, whoever wrote them; what has no partner is told."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    student = answer("student", "p", "a1") + answer("student", "p", "a2") + answer("student", "only a", "a3")
    student += answer("student", "p", "elsewhere", "ood")
    (tmp_path / "a/answers.jsonl").write_text(student + answer("teacher", "p", "t1"))
    (tmp_path / "b/answers.jsonl").write_text(answer("student", "p", "b1") + answer("student", "p", "b2"))
    out = tmp_path / "pairs.jsonl"

    def make(*flags: str) -> list[tuple[str, str, str]]:
        command = ["pairs", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out), *flags]
        assert judge.main(command) == 0
        return [(line["prompt"], line["answer_a"], line["answer_b"]) for line in read_lines(out, "pairs", ())]

    assert make() == [("p", "a1", "b1")]
    assert "1 pairs in" in (told := capfd.readouterr().out)
    assert "1 answers without a partner are left out" in told
    assert make("--samples", "2") == [("p", "a1", "b1"), ("p", "a2", "b2")]
    assert make("--writer-a", "teacher") == [("p", "t1", "b1")]
    nothing = ["pairs", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out), "--writer-b", "reference"]
    assert judge.main(nothing) == 1
    assert "writer_b: " in capfd.readouterr().err
    (tmp_path / "b/answers.jsonl").unlink()
    assert judge.main(["pairs", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 1
    assert "has no answers.jsonl; make it: python experiments/evaluate.py" in capfd.readouterr().err


def test_help_is_light() -> None:
    code = (
        "import sys, experiments.judge as j\ntry: j.main(['api', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'openai', 'sacrebleu'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert said.stdout.splitlines()[-1] == "[]"
