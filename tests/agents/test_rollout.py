"""Draft and verify is token-by-token gating: the same answers, the exact law, fewer teacher passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from agents.collector import collect
from agents.draft_length import DraftLength
from agents.references import read_references
from agents.rollout import Rollout
from agents.rollout_metrics import rollout_metrics, rollout_sums
from distill_env.divergence import project, reverse_kl
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import ALWAYS, NEVER, Gate, random_gate
from distill_env.models.tabular import TabularModel, markov
from distill_env.randomness import Purpose, episode_keys, uniform
from experiments.benchmarking.cost_model import blocks
from tests.helpers.tables import NO_PROMPT, Answer, Ragged, argmax, gated_law, nucleus, perturbed

V, HORIZON, N, LONGEST = 5, 9, 7, 16
TEACHER = markov(V, order=2, seed=4, sharpness=1.5)  # whose answers have 1 to 9 tokens
STUDENT = perturbed(TEACHER, 1.0)

GATES: dict[str, Gate] = {
    "hard": Gate(tau=0.5),
    "soft": Gate(tau=0.5, alpha=4.0),
    "forward": Gate("forward_kl", 0.5),
    "entropy": Gate("teacher_entropy", 1.0),
    "rank": Gate("rank", 2),
    "random": random_gate(0.3),
    "mixture": random_gate(0.5, per_completion=True),
    "step mean": Gate(tau=0.5, step_reduction="mean"),
    "step max": Gate(tau=0.7, step_reduction="max"),
    "step sum": Gate(tau=1.0, step_reduction="sum", alpha=4.0),
    "step rank": Gate("rank", 2.0, step_reduction="sum"),
    "smoothed": Gate(tau=0.5, smoothing=0.6),
    "smoothed step": Gate(tau=0.5, smoothing=0.5, step_reduction="mean", score_clip=1.0),
    "relative": Gate(tau=1.5, relative=True),
    "hand_over_rest": Gate(tau=0.8, hand_over_rest=True),
    "adaswitch": Gate("forward_kl", 2.0, relative=True, hand_over_rest=True),
    "adaswitch smoothed": Gate("forward_kl", 2.0, smoothing=0.5, relative=True, hand_over_rest=True),
    "cumulative": Gate(tau=1.0, cumulative=True),
    "cumulative soft": Gate(tau=1.0, alpha=3.0, cumulative=True, smoothing=0.3),
    "student entropy": Gate("student_entropy", 1.2),
    "least confidence": Gate("least_confidence", 0.5, alpha=8.0),
    "margin over steps": Gate("margin", 0.6, step_reduction="mean", smoothing=0.3),
    "first of a step": Gate("student_entropy", 1.2, step_reduction="first"),
    "student's hand-over": Gate("margin", 0.9, hand_over_rest=True),
    "student's budget": Gate("student_entropy", 2.0, cumulative=True),
    "two stages": Gate(tau=0.4, screen="student_entropy", screen_tau=1.0),
    "never": NEVER,
    "always": ALWAYS,
}
ALONE = [name for name, gate in GATES.items() if gate.student_score and not gate.reads_teacher]


def write(
    gate: Gate,
    draft_length: DraftLength | int,
    num_envs: int,
    seed: int = 0,
    n: int = N,
    teacher: TabularModel = TEACHER,
    student: TabularModel = STUDENT,
    limits: tuple[int, float] = (0, 1.0),
    **kwargs: Any,
) -> Rollout:
    """n answers to ragged prompts."""
    env = DistillVectorEnv(
        num_envs,
        Ragged(V, HORIZON),
        teacher,
        chunk=LONGEST,
        autoreset_mode="Disabled",
        reveal_teacher=False,
        task_reward=1.0,
        **kwargs,
    )
    prompts = [env.prompts[i % len(env.prompts)] for i in range(n)]
    return collect(env, student, prompts, episode_keys(seed, np.arange(n)), gate, draft_length, *limits)


def assert_equal(actual: Rollout, expected: Rollout) -> None:
    """Token for token and flag for flag; numbers to rounding, and scores nan in the same places."""
    assert actual.tokens.equal(expected.tokens)
    assert actual.rewritten.equal(expected.rewritten)
    torch.testing.assert_close(actual.score, expected.score, rtol=0, atol=1e-9, equal_nan=True)
    for name in ("rewards", "token_log_prob", "grades", "teacher"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=1e-12)
    assert actual.support is None if expected.support is None else actual.support.equal(expected.support)  # type: ignore[union-attr]


# ---------------------------------------------------------------------- equality


SOME = (2, 4, 6, 7, LONGEST)  # with 3, 5, 7, 1 and 3 rows; the last is longer than any answer
EVERY = pytest.param(range(1, LONGEST + 1), marks=pytest.mark.slow)


@pytest.mark.parametrize("lengths", [SOME, EVERY], ids=["some", "all"])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_no_draft_length_and_no_batch_changes_an_answer(gate: Gate, lengths: Sequence[int]) -> None:
    """Drafts of 1 to 16 tokens and adapted ones, 1 to 7 rows with refilling: the rollout is the token-by-token one."""
    expected = write(gate, 1, N)
    for k in lengths:
        assert_equal(write(gate, k, 1 + k % N), expected)
    adaptive = DraftLength(LONGEST)
    for num_envs in (1, 3, N) if lengths != SOME else (3,):
        assert_equal(write(gate, adaptive, num_envs), expected)


@given(
    st.integers(0, 2**32),
    st.sampled_from(list(GATES.values())),
    st.floats(0.5, 2.0),
    st.integers(1, LONGEST),
    st.integers(1, N),
    st.sampled_from(["sample", "nucleus", "argmax"]),
    st.sampled_from(["token", "step"]),
    st.sampled_from([(0, 1.0), (2, 1.0), (0, 0.8)]),
)
@settings(deadline=None, max_examples=40)
def test_equality_over_seeds(
    seed: int, gate: Gate, factor: float, k: int, num_envs: int, rewrite: Any, span: Any, limits: tuple[int, float]
) -> None:
    """The same for drawn seeds, models, thresholds, ways of rewriting, spans and truncations of the divergence."""
    if gate.needs_scores:
        gate = dataclasses.replace(gate, tau=gate.tau * factor)
    if gate.score == "rank":
        limits = (0, 1.0)  # a rank needs the whole vocabulary
    teacher = markov(V, order=1, seed=seed % 1000, sharpness=1.5)
    kwargs: dict[str, Any] = {
        "seed": seed,
        "teacher": teacher,
        "student": perturbed(teacher, 1.0, seed % 999),
        "limits": limits,
        "rewrite": rewrite,
        "rewrite_span": span,
    }
    assert_equal(write(gate, k, num_envs, **kwargs), write(gate, 1, N, **kwargs))


Draws = Callable[[NDArray[np.uint64], Any, Purpose], NDArray[np.float64]]


def by_call() -> Draws:
    """Numbers from one stream, in the order in which they are asked for."""
    generator = np.random.default_rng(0)
    return lambda keys, positions, purpose: generator.random(np.broadcast(keys, positions).shape)


def by_row() -> Draws:
    """Keyed by the row of the batch in the episode's place."""
    return lambda keys, positions, purpose: uniform(np.arange(keys.size).reshape(keys.shape), positions, purpose)


def reseeded() -> Draws:
    """A generator that begins anew with every call."""
    return lambda keys, positions, purpose: np.random.default_rng(0).random(np.broadcast(keys, positions).shape)


def draw_by(patch: pytest.MonkeyPatch, draws: Draws) -> None:
    for module in ("agents.collector", "distill_env.env"):
        patch.setattr(f"{module}.uniform", draws)


@pytest.mark.parametrize("draws", [by_call, by_row])
@pytest.mark.parametrize("name", ["hard", "soft", "random"])
def test_equality_would_tell(name: str, draws: Callable[[], Draws], monkeypatch: pytest.MonkeyPatch) -> None:
    """With randomness keyed by the call or by the row, the rollouts compared above differ."""
    draw_by(monkeypatch, draws())
    expected = write(GATES[name], 1, N)
    draw_by(monkeypatch, draws())
    with pytest.raises(AssertionError):
        assert_equal(write(GATES[name], 4, 3), expected)


def test_the_grid_reaches_the_corners() -> None:
    """What is compared above has early ends and full lengths, ends written by either, and rewrites at the first and at
    the last possible position; the prompts have 0 to 3 tokens."""
    rollout = write(GATES["hard"], 5, 3, n=200)
    length = rollout.mask.sum(1)
    last = rollout.tokens.gather(1, length[:, None] - 1)[:, 0]
    by_teacher = rollout.rewritten.gather(1, length[:, None] - 1)[:, 0]
    ended = last == V - 1
    for case in (length == 1, length == HORIZON, ended & by_teacher, ended & ~by_teacher, ~ended & by_teacher):
        assert case.any()
    assert rollout.rewritten[:, 0].any()
    assert not rollout.rewritten[:, 0].all()
    assert {len(p.ids) for p in rollout.prompts} == {0, 1, 2, 3}


@torch.no_grad()
def test_what_a_rollout_tells_is_true() -> None:
    """Teacher rows, rewards, the student's log-probabilities, scores and grades, recomputed answer by answer."""
    r = write(GATES["hard"], 4, 3, n=40, rewrite_cost=0.3, log_prob_floor=-3.0)
    assert r.teacher is not None
    log_p = TEACHER.head(TEACHER.features([p.ids for p in r.prompts], r.tokens, r.mask))
    log_q = STUDENT.head(STUDENT.features([p.ids for p in r.prompts], r.tokens, r.mask))
    token = r.tokens[r.mask][:, None]
    torch.testing.assert_close(r.teacher, log_p)
    torch.testing.assert_close(r.score[r.mask], reverse_kl(log_q, log_p))
    assert (r.score[r.mask] >= 0.5).equal(r.rewritten[r.mask])
    own = ~r.rewritten[r.mask]
    torch.testing.assert_close(r.token_log_prob[r.mask], torch.where(own, log_q.gather(1, token)[:, 0], 0.0))
    rewards = r.rewards.clone()
    rewards[torch.arange(40), r.mask.sum(1) - 1] -= r.grades  # paid with the last token
    paid = log_p.gather(1, token)[:, 0].clamp(min=-3.0)
    torch.testing.assert_close(rewards[r.mask], torch.where(own, paid, -0.3))
    torch.testing.assert_close(r.grades, (r.tokens == 0).sum(1) / HORIZON, check_dtype=False)
    assert bool((paid == -3.0).any())


@pytest.mark.parametrize("limits", [(2, 1.0), (0, 0.8), (3, 0.9)])
@pytest.mark.parametrize("name", ["never", "always", "random", "hard", "soft", "adaswitch"])
def test_kept_teacher_rows_are_the_projection_of_the_full_ones(name: str, limits: tuple[int, float]) -> None:
    """With top-k or top-p the same answers and scores, since a gate reads the teacher whole; what is kept of the
    teacher is the support and the tail bucket of the full row."""
    full, truncated = write(GATES[name], 4, 3, n=20), write(GATES[name], 4, 3, n=20, limits=limits)
    assert truncated.tokens.equal(full.tokens)
    torch.testing.assert_close(truncated.score, full.score, equal_nan=True)
    assert full.teacher is not None
    assert truncated.teacher is not None
    assert truncated.support is not None
    assert truncated.support.shape[1] < V
    torch.testing.assert_close(truncated.teacher, project(full.teacher, truncated.support))
    kept = (truncated.support >= 0).sum(1)
    assert int(kept.max()) <= (limits[0] or V)
    if limits[1] == 1.0:
        assert int(kept.min()) == limits[0]
    else:
        mass = truncated.teacher[:, :-1].exp().sum(1)
        assert bool(((mass >= limits[1] - 1e-12) | (kept == limits[0])).all())


@pytest.mark.parametrize("limits", [(0, 1.0), (2, 1.0), (0, 0.8)])
def test_reference_answers_are_read_as_if_the_teacher_had_written_them(limits: tuple[int, float]) -> None:
    """Answers of the teacher, given as references: the same tokens, all of them its own, and the same rows of it, each
    state scored once. But they are counted as neither model's."""
    written = write(ALWAYS, 1, 3, n=20, limits=limits)
    answers = [tuple(row[row >= 0].tolist()) for row in written.tokens]
    prompts = [dataclasses.replace(p, reference_completion=a) for p, a in zip(written.prompts, answers, strict=True)]
    for num_envs in (1, 3, 20):
        env = DistillVectorEnv(num_envs, Ragged(V, HORIZON), TEACHER, chunk=4, autoreset_mode="Disabled")
        read = read_references(env, prompts, *limits)
        assert read.tokens.equal(written.tokens)
        assert read.rewritten.equal(written.rewritten)
        assert read.rewritten.equal(read.mask)
        counts = rollout_metrics(rollout_sums(read))
        assert counts["rollout/reference_tokens"] == counts["rollout/tokens"] == int(read.mask.sum())
        for name in ("rollout/student_tokens", "rollout/rewritten_share", "cost/teacher_tokens"):
            assert counts[name] == 0
        torch.testing.assert_close(read.teacher, written.teacher, rtol=0, atol=1e-12)
        assert read.support is None if written.support is None else read.support.equal(written.support)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="prompts: 2 of 3"):
        read_references(env, [prompts[0], *written.prompts[:2]])


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_a_rollout_needs_no_autoreset_and_leaves_it_alone(mode: str) -> None:
    """The same texts and the same cost, though rows wait idle at the end; afterwards the mode is what it was."""
    expected = write(GATES["hard"], 4, 3)
    env = DistillVectorEnv(
        3, Ragged(V, HORIZON), TEACHER, chunk=LONGEST, autoreset_mode=mode, reveal_teacher=False, task_reward=1.0
    )
    prompts = [env.prompts[i % len(env.prompts)] for i in range(N)]
    rollout = collect(env, STUDENT.fork(), prompts, episode_keys(0, np.arange(N)), GATES["hard"], 4)
    assert_equal(rollout, expected)
    for count in ("teacher_passes", "teacher_positions", "teacher_tokens"):
        assert getattr(rollout.cost, count) == getattr(expected.cost, count)
    assert env.autoreset_mode.value == env.metadata["autoreset_mode"].value == mode
    env.reset(seed=0)
    ends = [env.step(np.full((3, 1), V - 1))[2].tolist() for _ in range(2)]
    assert ends == [[True] * 3, [mode == "SameStep"] * 3]  # the end token ends at once, or the row is reset first


# ---------------------------------------------------------------------- the law


LAW_GATES = {
    "hard": Gate(tau=0.25),
    "soft": Gate(tau=0.25, alpha=6.0),
    "rank": Gate("rank", 1),
    "random": random_gate(0.4),
    "step mean": Gate(tau=0.25, step_reduction="mean"),
    "smoothed": Gate(tau=0.25, smoothing=0.5),
    "relative": Gate(tau=1.0, relative=True),
    "hand_over_rest": Gate(tau=0.25, hand_over_rest=True),
    "cumulative": Gate(tau=0.5, cumulative=True),
    "student entropy": Gate("student_entropy", 1.0),
    "margin": Gate("margin", 0.75, alpha=8.0, step_reduction="first"),
    "two stages": Gate(tau=0.25, screen="student_entropy", screen_tau=1.0),
}


def chi_square(counts: dict[Answer, int], law: dict[Answer, float]) -> float:
    """p-value of these counts under the law; answers expected fewer than five times are taken together."""
    n = sum(counts.values())
    assert counts.keys() <= law.keys()
    often = [a for a, p in law.items() if n * p >= 5]
    observed = [counts.get(a, 0) for a in often]
    expected = [n * law[a] for a in often]
    rest = n - sum(expected)
    if rest > 1e-6:
        observed, expected = [*observed, n - sum(observed)], [*expected, rest]
    return float(stats.chisquare(observed, expected).pvalue)


def against_the_law(gate: Gate, rewrite: Any, span: Any) -> float:
    """The p-value of 4,000 keyed episodes under the law enumerated by a token-by-token recursion: answers and who wrote
    what."""
    teacher = markov(3, order=1, seed=2, sharpness=1.0)
    student = perturbed(teacher, 1.0, seed=5)
    n = 4000
    env = DistillVectorEnv(
        500,
        "categorical",
        teacher,
        task_kwargs={"vocab_size": 3, "max_new_tokens": 3, "empty_prompt": True},
        rewrite=rewrite,
        rewrite_top_p=0.6,
        rewrite_span=span,
        chunk=4,
        autoreset_mode="Disabled",
    )
    rollout = collect(env, student, [NO_PROMPT] * n, episode_keys(11, np.arange(n)), gate, 3)
    counts: dict[Answer, int] = {}
    for tokens, flags, length in zip(
        rollout.tokens.tolist(), rollout.rewritten.tolist(), rollout.mask.sum(1).tolist(), strict=True
    ):
        answer = tuple(tokens[:length]), tuple(flags[:length])
        counts[answer] = counts.get(answer, 0) + 1
    draw = {"sample": lambda p: p, "nucleus": nucleus(0.6), "argmax": argmax}[rewrite]
    law = gated_law(student, teacher, gate, 3, draw=draw, span=span)
    assert sum(law.values()) == pytest.approx(1)
    assert {f for _, flags in law for f in flags} == {True, False}
    return chi_square(counts, law)


@pytest.mark.parametrize("span", ["token", "step"])
@pytest.mark.parametrize("rewrite", ["sample", "nucleus", "argmax"])
@pytest.mark.parametrize("gate", LAW_GATES.values(), ids=LAW_GATES)
def test_the_law_is_that_of_gated_generation(gate: Gate, rewrite: Any, span: Any) -> None:
    """The numbers are fixed; a right sampler has a p-value below 1e-3 in one of a thousand such tests."""
    assert against_the_law(gate, rewrite, span) > 1e-3


@pytest.mark.parametrize("gate", LAW_GATES.values(), ids=LAW_GATES)
def test_the_law_would_tell(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a generator that is reseeded at every call the answers have another law."""
    draw_by(monkeypatch, reseeded())
    assert against_the_law(gate, "sample", "token") < 1e-9


# ---------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("k", [1, 3, 8])
def test_cost(k: int) -> None:
    """Tokens are drafted or the teacher's; what is drafted stands or is wasted; a pass scores each committed token at
    most once. Token by token the teacher scores each state exactly once; by drafts it is asked less often."""
    single, drafted = write(GATES["hard"], 1, N), write(GATES["hard"], k, N)
    cost = drafted.cost
    tokens, rewritten = int(drafted.mask.sum()), int(drafted.rewritten.sum())
    assert 0 < rewritten < tokens  # hard and easy steps
    assert cost.teacher_tokens == rewritten
    assert cost.accepted == tokens - rewritten
    assert cost.drafted == cost.accepted + cost.wasted
    assert single.cost.wasted == rewritten  # the token at a hard state is drawn in vain
    assert single.cost.teacher_positions == tokens  # one for every state, the prompt's among them
    assert cost.teacher_positions <= tokens + cost.wasted
    if k > 1:
        assert cost.teacher_passes < single.cost.teacher_passes
        assert cost.wasted >= rewritten
    assert cost.seconds >= cost.student_seconds + cost.teacher_seconds > 0


def test_the_teacher_is_not_asked_where_nobody_listens() -> None:
    """A gate that reads no model wastes no draft; nothing is scored twice, and writing always needs no student."""
    for name in ("never", "random", "mixture", "always"):
        rollout = write(GATES[name], 5, N, n=30)
        assert rollout.cost.wasted == 0
        assert rollout.cost.teacher_positions == int(rollout.mask.sum())
    assert rollout.cost.drafted == 0


@pytest.mark.parametrize("name", ["never", "random"])
def test_drafts_are_longest_where_the_gate_needs_no_model(name: str) -> None:
    """Nothing is drafted beyond a rewrite that is known beforehand, so nothing is drawn in vain."""
    used = write(GATES[name], DraftLength(LONGEST), num_envs=N).cost
    longest = write(GATES[name], LONGEST, num_envs=N).cost
    assert used.wasted == 0
    assert (used.teacher_passes, used.drafted) == (longest.teacher_passes, longest.drafted)
    if name == "never":
        assert used.teacher_passes == 2  # the prompts, and the whole answers


def test_after_a_hand_over_nothing_is_drafted() -> None:
    """The rest of the answer is the teacher's; the student neither drafts nor is looked at, and what is wasted was
    drafted before the hand-over was known."""
    rollout = write(GATES["hand_over_rest"], 4, N, n=50)
    length, first = rollout.mask.sum(1), rollout.rewritten.int().argmax(1)
    handed = rollout.rewritten.any(1)
    assert handed.any()
    assert not handed.all()
    places = torch.arange(rollout.mask.shape[1])
    after = handed[:, None] & (places > first[:, None]) & rollout.mask
    assert after.any()
    assert bool(rollout.rewritten[after].all())
    assert bool(rollout.score[after].isnan().all())
    assert not bool(rollout.score[rollout.mask & ~after].isnan().any())
    assert rollout.cost.wasted <= 4 * int(handed.sum())
    assert int((length - first)[handed].sum()) == rollout.cost.teacher_tokens


@pytest.mark.parametrize("k", [2, 3, 5, LONGEST])
@pytest.mark.parametrize("seed", [1, 2, 3])  # in which no last rewrite is what had been drafted, which saves its pass
def test_the_teacher_is_asked_once_a_block(k: int, seed: int) -> None:
    """What the cost model counts from the hard steps of answers is what the cost counts: a pass a block, and one
    for the prompts."""
    written = write(GATES["hard"], k, N, seed)
    counted = blocks(written.rewritten.numpy(), written.mask.sum(1).numpy(), k)
    assert written.cost.teacher_passes == 1 + counted.max()
    assert 1 < counted.max() < HORIZON


@pytest.mark.parametrize("k", [1, 3, LONGEST])
@pytest.mark.parametrize("name", ALONE)
def test_a_student_that_knows_when_to_ask_needs_no_verification(name: str, k: int) -> None:
    """No drafted token is wasted. The teacher is called only where it writes: it reads the prefix, once with a prefix
    cache, and scores that position. The scores that the update reads come with these calls, or at the end."""
    rollout = write(GATES[name], k, 3, n=40)
    cost, mask, rewritten = rollout.cost, rollout.mask, rollout.rewritten
    assert 0 < int(rewritten.sum()) < int(mask.sum())
    assert cost.wasted == 0
    assert cost.teacher_positions == int(mask.sum())
    before = torch.tensor([len(p.ids) for p in rollout.prompts])[:, None] + torch.arange(mask.shape[1])
    calls = rewritten.clone()
    if GATES[name].hand_over_rest:
        calls[:, 1:] &= ~rewritten[:, :-1]
    assert (cost.calls, cost.scored) == (int(calls.sum()), int(rewritten.sum()))
    assert cost.processed == int(torch.where(rewritten, before, 0).max(1).values.sum())
    assert cost.reprocessed == int((before * calls + (rewritten & ~calls)).sum())


def test_what_verification_costs() -> None:
    """Token by token the gate reads every position in a call of its own; drafts save calls. A screen saves positions,
    and so do both ends."""
    rollout = write(GATES["hard"], 1, 3, n=40)
    lengths, prompts = rollout.mask.sum(1), torch.tensor([len(p.ids) for p in rollout.prompts])
    cost = rollout.cost
    assert cost.calls == cost.scored == int(lengths.sum())
    assert cost.processed == int((prompts + lengths - 1).sum())
    assert cost.reprocessed == int((prompts * lengths + lengths * (lengths - 1) // 2).sum())
    drafted = write(GATES["hard"], 4, 3, n=40).cost
    assert drafted.calls < cost.calls
    assert drafted.scored > cost.scored  # beyond a hard position in vain
    screened = write(GATES["two stages"], 1, 3, n=40)
    asked = int((screened.score[screened.mask] > 0).sum())
    assert screened.cost.calls == screened.cost.scored == asked < cost.scored
    alone, teacher = write(NEVER, 4, 3, n=40).cost, write(ALWAYS, 4, 3, n=40)
    assert (alone.calls, alone.processed, alone.scored) == (0, 0, 0)
    assert teacher.cost.calls == 40
    assert teacher.cost.scored == int(teacher.mask.sum())


class Told(DraftLength):
    """Adds up what it is told."""

    cut = looked_at = 0

    def observe(self, rows: int, cut: int, looked_at: int, *times: Any) -> None:
        self.cut, self.looked_at = self.cut + cut, self.looked_at + looked_at
        super().observe(rows, cut, looked_at, *times)


@pytest.mark.parametrize("name", ["hard", "soft", "rank", "step max", "hand_over_rest"])
def test_the_draft_length_is_told_what_cuts_drafts_short(name: str) -> None:
    """Hard steps and end tokens, each once, among all states at which the gate decided."""
    told = Told(LONGEST)
    r = write(GATES[name], told, 9, n=200)
    decided = r.mask & ~r.score.isnan()
    assert told.looked_at == int(decided.sum())
    assert told.cut == int((decided & (r.rewritten | (r.tokens == V - 1))).sum())
    assert int((decided & r.rewritten & (r.tokens == V - 1)).sum()) > 0


def tell(adaptive: DraftLength, cut_rate: float, student: float, base: float, slope: float, rows: int = 1) -> int:
    """The length chosen for `rows` after many blocks of one to four rows whose times follow the model: a step takes
    `student`, a pass `base + slope * positions`."""
    for i in range(200):
        width, written = 1 + i % adaptive.longest, 1 + i % 4
        adaptive.observe(written, round(1000 * cut_rate), 1000, student, width, base + slope * written * width)
    return adaptive.choose(rows)


@pytest.mark.parametrize("cut_rate", [0.0, 0.01, 0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("base", "slope"), [(10.0, 0.1), (3.0, 1.0), (0.1, 0.1), (0.0, 5.0)])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_draft_length_is_the_best_one(cut_rate: float, base: float, slope: float, rows: int) -> None:
    """From measured times (a student step takes 1) the length is chosen that commits most tokens a second in a batch
    of so many rows, the expectation summed token by token."""

    def rate(k: int) -> float:
        committed = sum((1 - cut_rate) ** i for i in range(k))  # a token is reached if none before it cut the draft
        return committed / (k + base + slope * rows * k)

    chosen = tell(DraftLength(LONGEST), cut_rate, 1.0, base, slope, rows)
    assert rate(chosen) == pytest.approx(max(rate(k) for k in range(1, LONGEST + 1)), rel=1e-3)


def test_draft_lengths_are_sensible() -> None:
    """Long where little is hard, a pass is dear or few rows write, one where all is hard; before anything is measured,
    moderate."""
    assert tell(DraftLength(LONGEST), 0.0, 1.0, 10.0, 0.1) == LONGEST
    assert tell(DraftLength(LONGEST), 1.0, 1.0, 10.0, 0.1) == 1
    lengths = [tell(DraftLength(LONGEST), h, 1.0, 3.0, 0.5) for h in (0.01, 0.1, 0.3, 0.9)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    assert tell(DraftLength(LONGEST), 0.1, 0.1, 3.0, 0.5, rows=1) > tell(
        DraftLength(LONGEST), 0.1, 0.1, 3.0, 0.5, rows=4
    )
    assert DraftLength(LONGEST).choose(1) == 8
    assert DraftLength(3).choose(1) == 3


# ---------------------------------------------------------------------- bad input


def test_bad_arguments() -> None:
    """One line that names what was wrong and what would be right."""
    env = DistillVectorEnv(4, Ragged(V, HORIZON), TEACHER, autoreset_mode="Disabled")
    keys = episode_keys(0, np.arange(4))
    with pytest.raises(ValueError, match="prompts: 2 for 4 rows"):
        collect(env, STUDENT, [NO_PROMPT] * 2, keys, NEVER)
    with pytest.raises(ValueError, match="student: "):
        collect(env, markov(6), [NO_PROMPT] * 4, keys, NEVER)
    with pytest.raises(ValueError, match="score: "):
        collect(env, STUDENT, [NO_PROMPT] * 4, keys, Gate("rank", 2.0), top_k=2)
