"""A served teacher equals the local one: exactly if all ids are returned, within a bound if the likeliest are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.checkpoint import checkpoints
from agents.collector import collect
from agents.references import read_references
from agents.rollout import Rollout
from distill_env.divergence import entropy, forward_kl, project, reverse_kl, support, truncation_gap
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import Gate
from distill_env.models.base import ServerLostError
from distill_env.models.causal_lm import CausalLM
from distill_env.models.hub import load_tokenizer
from distill_env.models.load import build_model, load_model
from distill_env.models.served import KEY_VARIABLE, ServedModel, cheaper_from_cache
from distill_env.models.tabular import markov
from distill_env.models.toy import TEACHERS, toy_student, toy_tokenizer
from distill_env.randomness import Purpose, episode_keys, inverse_cdf, uniform
from experiments import run as run_module
from experiments.running.flags import parse
from experiments.running.run_folder import read_metrics
from tests.helpers.servers import CompletionsServer
from tests.helpers.tables import Ragged, perturbed

V, HORIZON, N = 8, 9, 14
TEACHER = markov(V, order=2, seed=4, sharpness=1.5)
STUDENT = perturbed(TEACHER, 1.0)
SUMS = str(TEACHERS["sums"])


@pytest.fixture(scope="module")
def server() -> Iterator[CompletionsServer]:
    with CompletionsServer(TEACHER) as it:
        yield it


def ask(server: CompletionsServer, top_k: int = 0, **kwargs: Any) -> ServedModel:
    arguments = {"vocab_size": V, "eos_token_id": V - 1, "first_wait": 0.01, "patience": 20.0, "concurrency": 4}
    return ServedModel(server.url, top_k=top_k, **arguments | kwargs)


def write(teacher: Any, top_k: int = 0, rewrite: str = "sample", gate: Gate | None = None) -> Rollout:
    env = DistillVectorEnv(
        5, Ragged(V, HORIZON), teacher, chunk=8, autoreset_mode="Disabled", reveal_teacher=False, rewrite=rewrite
    )
    prompts = [env.prompts[i % len(env.prompts)] for i in range(N)]
    return collect(env, STUDENT, prompts, episode_keys(0, np.arange(N)), gate or Gate(tau=0.5), 4, top_k)


def assert_equal(actual: Rollout, expected: Rollout) -> None:
    assert actual.tokens.equal(expected.tokens)
    assert actual.rewritten.equal(expected.rewritten)
    for name in ("score", "teacher", "token_log_prob"):
        torch.testing.assert_close(
            getattr(actual, name).double(), getattr(expected, name).double(), rtol=1e-4, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("top_k", [0, 2])
def test_ids_that_do_not_exist_have_no_probability(server: CompletionsServer, top_k: int) -> None:
    teacher = ask(server, top_k, absent_ids=(1, 2))
    (log_probs,) = teacher.start([[0, 3]]).double()
    expected = TEACHER.fork().start([[0, 3]])[0].double()
    assert bool(log_probs[[1, 2]].isneginf().all())
    torch.testing.assert_close(log_probs.exp().sum(), torch.ones((), dtype=torch.float64))
    if top_k == 0:
        expected[[1, 2]] = -torch.inf
        torch.testing.assert_close(log_probs, expected.log_softmax(-1), rtol=1e-4, atol=1e-5)
    teacher.close()


@pytest.mark.parametrize("rewrite", ["sample", "nucleus", "argmax"])
def test_with_all_ids_it_equals_the_local_teacher(server: CompletionsServer, rewrite: str) -> None:
    teacher = ask(server)
    actual, expected = write(teacher, rewrite=rewrite), write(TEACHER, rewrite=rewrite)
    assert_equal(actual, expected)
    torch.testing.assert_close(actual.rewards, expected.rewards, rtol=1e-5, atol=1e-5)
    teacher.close()


def test_gates_and_truncated_divergences_are_exact_on_the_likeliest(server: CompletionsServer) -> None:
    teacher, known_on_three = ask(server, 3), TEACHER.fork()
    known_on_three.top_k = 3  # type: ignore[attr-defined]
    for gate in (*(Gate(tau=0.5), Gate("forward_kl", 0.5)), Gate("jensen_shannon", 0.2), Gate("teacher_entropy", 0.8)):
        actual, expected = write(teacher, 3, "argmax", gate), write(known_on_three, 3, "argmax", gate)
        assert_equal(actual, expected)
        assert actual.support is not None
        assert actual.support.equal(expected.support)
    assert actual.rewritten.any()  # otherwise the test shows little
    assert not actual.rewritten[actual.mask].all()
    teacher.close()


def test_what_a_truncation_can_hide_is_bounded(server: CompletionsServer) -> None:
    """The bounds of the class docstring, on every state; p^ is what is served."""
    histories = [[i] for i in range(V)] + [[i, j] for i in range(V) for j in range(V)]
    teacher = ask(server, 3)
    served, p, q = teacher.start(histories).double(), TEACHER.start(histories), STUDENT.start(histories)
    ids = support(p, 3)
    assert ids is not None
    torch.testing.assert_close(project(served, ids), project(p, ids), rtol=1e-5, atol=1e-5)
    tail = torch.ones_like(p, dtype=torch.bool).scatter(-1, ids, False)
    least = torch.where(tail, p, torch.inf).min(-1).values
    truncated = reverse_kl(project(q, ids), project(p, ids))
    gap = truncation_gap(q, p, ids, least)
    assert (truncated <= reverse_kl(q, p) + 1e-9).all()
    assert (reverse_kl(q, p) <= truncated + gap + 1e-9).all()
    q_tail, p_tail = project(q, ids)[:, -1].exp(), project(p, ids)[:, -1].exp()
    most = q_tail * torch.maximum(torch.tensor(V - 3.0).log(), p_tail.log() - least)
    assert ((reverse_kl(q, served) - reverse_kl(q, p)).abs() <= most + 1e-5).all()
    assert (forward_kl(project(q, ids), project(p, ids)) <= forward_kl(q, p) + 1e-9).all()
    coarse = entropy(project(p, ids))
    assert ((entropy(p) - coarse >= -1e-9) & (entropy(p) - coarse <= p_tail * math.log(V - 3) + 1e-9)).all()
    teacher.close()


def test_the_bound_is_reached() -> None:
    """A student all of whose mass in the tail is where the teacher has least."""
    p = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]).double().log()
    q = torch.tensor([0.4, 0.4, 0.0, 0.0, 0.2]).double().log()
    ids = torch.tensor([0, 1])
    gap = truncation_gap(q, p, ids, p.min())
    assert float(reverse_kl(q, p)) == pytest.approx(float(reverse_kl(project(q, ids), project(p, ids)) + gap))


def test_what_a_bounded_gate_finds_easy_is_easy(server: CompletionsServer) -> None:
    """The Jensen-Shannon score of a served teacher is never below that of the whole distribution, D_t never above."""
    teacher = ask(server, 3)
    for score, sign in (("jensen_shannon", 1), ("divergence", -1)):
        served, local = (write(t, k, "argmax", Gate(score, 99.0)) for t, k in ((teacher, 3), (TEACHER, 0)))
        assert served.tokens.equal(local.tokens)
        gap = sign * (served.score - local.score)[served.mask]
        assert (gap > -1e-4).all()
        assert (gap > 1e-2).any()
    teacher.close()


def test_rewrites_are_keyed_draws_of_the_likeliest(server: CompletionsServer) -> None:
    teacher = ask(server, 3)
    rollout = write(teacher, 3, gate=Gate(tau=0.1))
    seen = 0
    for n, prompt in enumerate(rollout.prompts):
        for t in torch.nonzero(rollout.rewritten[n])[:, 0].tolist():
            log_p = TEACHER.start([[*prompt.ids, *rollout.tokens[n, :t].tolist()]])[0]
            kept = torch.full_like(log_p, -torch.inf).scatter(0, log_p.topk(3).indices, log_p.topk(3).values)
            draw = uniform(episode_keys(0, n), t, Purpose.TEACHER)
            assert int(rollout.tokens[n, t]) == int(inverse_cdf(kept[None], draw))
            seen += 1
    assert seen > 5
    teacher.close()


def test_divergences_over_ids_that_are_not_returned_are_refused(server: CompletionsServer) -> None:
    teacher = ask(server, 3)
    for top_k in (0, 4):
        with pytest.raises(ValueError, match=rf"top_k: {top_k}; .*1 to 3"):
            write(teacher, top_k)
    env = DistillVectorEnv(2, Ragged(V, HORIZON), teacher, autoreset_mode="Disabled")
    with pytest.raises(ValueError, match="top_k: 0"):
        read_references(env, [env.prompts[0].__class__((0,), "a", reference_completion=(1, 2))])
    env.reset(seed=0)  # the environment itself needs no other ids
    teacher.close()


def test_a_single_position_leaves_the_prefix_cache_of_use(server: CompletionsServer) -> None:
    """No log-probabilities of the prompt are asked for, and a block of several tokens is one request a row."""
    teacher = ask(server, 3)
    server.requests.clear()
    teacher.start([[0], [1, 2]])
    teacher.extend(torch.tensor([[3], [4]]))
    assert ["prompt_logprobs" in r for r in server.requests] == [False] * 4
    server.requests.clear()
    block = teacher.extend(torch.tensor([[1, 2, 3], [5, -1, -1]]))
    assert sorted((len(r["prompt"]), "prompt_logprobs" in r) for r in server.requests) == [(4, False), (5, True)]
    local = TEACHER.start([[0, 3, 1], [0, 3, 1, 2], [0, 3, 1, 2, 3], [1, 2, 4, 5]])
    served = torch.cat([block[0], block[1, :1]]).double()
    ids = support(local, 3)
    torch.testing.assert_close(project(served, ids), project(local, ids), rtol=1e-5, atol=1e-5)
    teacher.rewind([1, -1])
    again = teacher.extend(torch.tensor([[1], [-1]]))
    torch.testing.assert_close(again[0, 0], block[0, 0])
    with pytest.raises(ValueError, match="tokens: row 1 "):
        teacher.extend(torch.tensor([[-1], [1]]))
    teacher.close()


def test_a_short_block_of_a_long_row_is_read_from_the_prefix_cache(server: CompletionsServer) -> None:
    """A list of beginnings where that is less to compute, else the whole row: the same log-probabilities."""
    assert [n for n in range(200) if cheaper_from_cache(100, n)] == list(range(2, 9))
    rows = torch.randint(V, (2, 40), generator=torch.Generator().manual_seed(0))
    local, teacher = TEACHER.fork(), ask(server, 3)
    for it in (local, teacher):
        it.start(rows.tolist())
    server.requests.clear()
    for block in (torch.tensor([[1, 2, 3], [4, 5, -1]]), torch.arange(16).reshape(2, 8) % V):
        expected, served = local.extend(block), teacher.extend(block).double()
        ids = support(expected, 3)
        tokens = block >= 0
        torch.testing.assert_close(project(served, ids)[tokens], project(expected, ids)[tokens], rtol=1e-5, atol=1e-5)
    asked = [(len(r["prompt"]), "prompt_logprobs" in r) for r in server.requests]
    assert sorted(asked) == [(2, False), (3, False), (50, True), (51, True)]
    teacher.close()


def test_a_token_beside_the_likeliest_is_left_out(server: CompletionsServer) -> None:
    """A server may draw by other rules than it tells log-probabilities by: a penalty of the model's own settings."""
    teacher, rows = ask(server, 3), [[0, i] for i in range(V)]
    expected = teacher.start(rows)
    server.favourite = 2
    actual = teacher.start(rows)
    server.favourite = None
    assert actual.equal(expected)
    assert (TEACHER.start(rows).topk(3).indices != 2).all(-1).any()
    teacher.close()


def test_a_server_that_dies_and_comes_back_changes_nothing() -> None:
    servers, lines = [CompletionsServer(TEACHER)], []

    def restart(line: str) -> None:
        lines.append(line)
        if len(servers) == 1:
            servers.append(CompletionsServer(TEACHER, port=servers[0].port))

    teacher = ask(servers[0], 3, warn=restart)
    expected = write(teacher, 3)
    servers[0].close()
    assert_equal(write(teacher, 3), expected)
    assert len(lines) == 1
    assert "http://127.0.0.1" in lines[0]
    servers[1].failures += [503, 0, 429, 500]
    assert_equal(write(teacher, 3), expected)
    teacher.close()
    for it in servers[1:]:
        it.close()


def test_patience_ends_in_a_line() -> None:
    with CompletionsServer(TEACHER) as server:
        teacher = ask(server, 3, patience=0.05, warn=lambda line: None)
    with pytest.raises(ServerLostError, match=r"^teacher: .*ConnectionRefusedError") as error:
        teacher.start([[0]] * 6)
    assert "\n" not in str(error.value)
    teacher.close()


def test_refusals_are_one_line_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    coins = str(TEACHERS["coins"])
    with CompletionsServer(load_model(coins), tokenizer=load_tokenizer(coins)) as server:
        ask(server, 3, tokenizer=coins).close()
        with pytest.raises(ValueError, match="tokenizer: "):
            ask(server, 3, tokenizer=SUMS)
    with CompletionsServer(TEACHER, ("a", "b"), limit=5) as server:
        for name in ("", "c"):
            with pytest.raises(ValueError, match=rf"model: '{name}'.*: a, b$"):
                ask(server, 3, model=name)
        teacher = ask(server, 6, model="a")
        with pytest.raises(ValueError, match=r"teacher: .*400: Requested sample logprobs of 6") as caught:
            teacher.start([[0]])
        assert "secret" not in str(caught.value)
        assert set(server.keys) == {"Bearer secret"}
        teacher.close()
        teacher, server.legacy = ask(server, 3, model="b"), True
        teacher.start([[0]])
        with pytest.raises(ValueError, match="teacher: "):
            teacher.extend(torch.tensor([[1, 2]]))
        teacher.close()
    for url in ("http://me:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(ValueError, match="url: ") as refused:
            build_model(url, vocab_size=V, eos_token_id=0)
        assert "secret" not in str(refused.value)
    monkeypatch.setenv(KEY_VARIABLE, "sec\nret")  # which a header cannot hold
    with CompletionsServer(TEACHER) as server, pytest.raises(ValueError, match=KEY_VARIABLE) as unusable:
        ask(server)
    assert "ret" not in str(unusable.value)


def test_no_redirect_is_followed_and_no_other_response_accepted(server: CompletionsServer) -> None:
    """The key goes to the given server only."""
    teacher, before = ask(server, 3), len(server.requests)
    for status in (307, 200):  # to another path of the server, and a response without completions
        server.failures.append(status)
        with pytest.raises(ValueError, match="teacher: "):
            teacher.start([[0]])
    assert len(server.requests) == before + 2
    teacher.close()


def test_a_served_teacher_truncates_the_method() -> None:
    served = ["--env", "lm", "--teacher", "http://h/v1", "--student", "s"]
    assert parse(served).agent_options.method.top_k == 20  # type: ignore[union-attr]
    assert parse([*served, "--top-k", "4"]).agent_options.method.top_k == 4  # type: ignore[union-attr]
    assert parse([*served, "--teacher-top-k", "0"]).agent_options.method.top_k == 0  # type: ignore[union-attr]
    for flags, expected in (
        (["--top-k", "21"], "top_k: 21; .* 20"),
        (["--agent", "skd"], "rank"),
        (["--agent", "todi"], "todi"),
        (["--agent", "minillm"], "importance"),
    ):
        with pytest.raises(ValueError, match=expected):
            parse([*served, *flags])


def test_a_run_outlives_its_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server is lost during training; the run resumes with another one and ends like an uninterrupted run."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+3="}\n')
    student = str(tmp_path / "student")
    torch.manual_seed(0)
    CausalLM(toy_student("sums", 16, 1, 16)).save_pretrained(student)
    toy_tokenizer("sums").save_pretrained(student)
    flags = ["--env", "lm", "--student", student, "--task-path", str(tmp_path / "data.jsonl"), "--max-new-tokens", "6"]
    flags += ["--iterations", "4", "--batch-size", "4", "--eval-prompts", "1", "--eval-samples", "1", "--tau", "7.5"]
    flags += ["--draft-length", "3", "--draft-limit", "3", "--teacher-top-k", "5", "--validate-every", "9"]
    flags += ["--teacher-timeout", "0.2", "--learning-rate", "1e-3", "--track", "none", "--out", str(tmp_path)]
    model, tokenizer = load_model(SUMS), load_tokenizer(SUMS)
    with CompletionsServer(model, tokenizer=tokenizer, context=64) as server:
        assert run_module.main([*flags, "--teacher", server.url, "--name", "whole"]) == 0
        total = len(server.requests)
    capsys.readouterr()
    with CompletionsServer(model, tokenizer=tokenizer, context=64) as server:
        server.left = total // 2
        assert run_module.main([*flags, "--teacher", server.url, "--name", "lost"]) == 1
    *lines, last = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("teacher: ") for line in lines)
    assert last.startswith("error: teacher: ")
    assert "--resume" in last
    kept = checkpoints(tmp_path / "lost" / "checkpoints")[0].name
    assert 0 < int(kept) < 4
    assert int(kept) == len(read_metrics(tmp_path / "lost"))
    with CompletionsServer(model, tokenizer=tokenizer, context=64) as server:
        resume = ["--resume", "--name", "lost", "--out", str(tmp_path), "--teacher", server.url]
        assert run_module.main(resume) == 0
    for lost, whole in zip(read_metrics(tmp_path / "lost"), read_metrics(tmp_path / "whole"), strict=True):
        for key in ("train/loss", "rollout/rewritten_share", "rollout/truncated_divergence"):
            assert lost[key] == pytest.approx(whole[key], abs=1e-6)
    assert any(0 < row["rollout/rewritten_share"] < 1 for row in read_metrics(tmp_path / "whole"))
