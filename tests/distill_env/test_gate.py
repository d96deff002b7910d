"""The gate: what it scores, how it reads scores, what it decides, and that it does so causally and without gradient."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_env.divergence import reverse_kl
from distill_env.gate import (
    DraftBlock,
    GateDecision,
    GateState,
    apply_gate,
    decide,
    follow_quantile,
    raw_score,
    read_and_decide,
    read_score,
    student_score,
)
from distill_env.gate_settings import ALWAYS, NEVER, SCORE_NAMES, STUDENT_SCORES, Gate, custom_score, random_gate
from tests.helpers.tables import naive_read, naive_score

READABLE = [name for name in SCORE_NAMES if name != "predicted_divergence"]  # which a head of the student says

N, K, V = 4, 9, 5


def models(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher, float64 [N, K, V]."""
    student, teacher = torch.randn(2, N, K, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return student.log_softmax(-1), teacher.log_softmax(-1)


def block(seed: int = 0) -> DraftBlock:
    generator = torch.Generator().manual_seed(seed)
    return DraftBlock(
        torch.randint(V, (N, K), generator=generator),
        torch.rand(N, K, generator=generator) < 0.3,
        torch.rand(N, K, generator=generator, dtype=torch.float64),
        torch.rand(N, generator=generator, dtype=torch.float64),
    )


def forward_kl_of_mine(student: Tensor, teacher: Tensor) -> Tensor:
    return (teacher.exp() * (teacher - student)).sum(-1)


def surprise(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    return -teacher.gather(-1, tokens[..., None])[..., 0]


@pytest.mark.parametrize("memory", [{}, {"smoothing": 0.5}, {"step_reduction": "sum"}, {"cumulative": True}])
def test_a_score_of_ones_own_is_read_as_a_built_in_one(memory: dict[str, Any]) -> None:
    """By its name as by the function itself, whatever the gate remembers."""
    own = custom_score(forward_kl_of_mine)
    gates = [Gate(score, 0.7, **memory) for score in ("forward_kl", own, f"{__name__}:forward_kl_of_mine")]
    decisions = [apply_gate(gate, *models(), block(), GateState.start(N))[0] for gate in gates]
    for decision in decisions[1:]:
        torch.testing.assert_close(decision.score, decisions[0].score)
        assert decision.rewrite.equal(decisions[0].rewrite)
    assert set(decisions[0].rewrite.flatten().tolist()) == {True, False}


def test_a_score_may_read_the_drafted_tokens() -> None:
    student, teacher = models()
    gate, draft = Gate(custom_score(surprise), 1.0), block()
    expected = -teacher.gather(-1, draft.tokens[..., None])[..., 0]
    torch.testing.assert_close(raw_score(gate, student, teacher, draft), expected)
    assert gate.reads_tokens
    assert not Gate(custom_score(forward_kl_of_mine)).reads_tokens
    assert [name for name in SCORE_NAMES if Gate(name).reads_tokens] == ["rank"]


@pytest.mark.parametrize("name", ["entropy", "no.such:score", f"{__name__}:no_score", f"{__name__}:N"])
def test_an_unknown_score_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^score: ") as error:
        Gate(name)
    assert "\n" not in str(error.value)


def test_a_score_returns_a_number_for_each_position() -> None:
    gate = Gate(custom_score(lambda student, teacher: teacher), 1.0)
    with pytest.raises(ValueError, match=r"^score: "):
        raw_score(gate, *models(), block())


def confidence(student: Tensor) -> Tensor:
    return student.max(-1).values.exp()


def test_a_score_declares_what_it_reads() -> None:
    """By its name, or by its parameters. A gate that reads the student alone decides without the teacher."""
    student, teacher = models()
    for name in (*STUDENT_SCORES, custom_score(confidence)):
        assert not Gate(name, 0.5).reads_teacher
    for name in (*(set(SCORE_NAMES) - set(STUDENT_SCORES)), custom_score(forward_kl_of_mine), custom_score(surprise)):
        assert Gate(name, 0.5).reads_teacher
    for gate in (Gate("margin", 0.3), Gate(custom_score(confidence), 0.5), Gate("student_entropy", 1.0, smoothing=0.5)):
        alone, _ = apply_gate(gate, student, None, block(), GateState.start(N))
        both, _ = apply_gate(gate, student, teacher, block(), GateState.start(N))
        assert alone.rewrite.equal(both.rewrite)
        assert set(alone.rewrite.flatten().tolist()) == {True, False}


def test_a_predicted_divergence_needs_a_head() -> None:
    gate, (student, _), draft = Gate("predicted_divergence", 0.5), models(), block()
    with pytest.raises(ValueError, match=r"^score: .*head"):
        apply_gate(gate, student, None, draft, GateState.start(N))
    predicted = torch.rand(N, K)
    said = dataclasses.replace(draft, student_score=student_score(gate, student, predicted))
    assert apply_gate(gate, student, None, said, GateState.start(N))[0].rewrite.equal(predicted >= 0.5)


def test_a_screen_asks_the_teacher_at_some_positions() -> None:
    """Where its student score is below its threshold the score is 0; a screen that asks everywhere changes nothing."""
    student, teacher = models()
    plain = raw_score(Gate(tau=0.5), student, teacher, block())
    entropy = raw_score(Gate("student_entropy", 0.5), student, None, block())
    screened = raw_score(Gate(tau=0.5, screen="student_entropy", screen_tau=1.0), student, teacher, block())
    torch.testing.assert_close(screened, torch.where(entropy >= 1.0, plain, 0.0))
    assert 0 < int((screened == 0).sum()) < N * K
    assert raw_score(Gate(tau=0.5, screen="margin"), student, teacher, block()).equal(plain)


@pytest.mark.parametrize("score", READABLE)
def test_scores(score: str) -> None:
    """Each is its definition, state by state."""
    student, teacher = models()
    draft, config = block(), Gate(score, 0.5)
    actual = raw_score(config, student, teacher, draft)
    expected = [
        [naive_score(config, student[i, k], teacher[i, k], int(draft.tokens[i, k])) for k in range(K)] for i in range(N)
    ]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_rank_counts_likelier_tokens() -> None:
    """0 for the teacher's favourite, V - 1 for its last; ties are not likelier."""
    teacher = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1]).log().expand(1, V, V)
    draft = DraftBlock(torch.arange(V)[None], torch.zeros(1, V, dtype=torch.bool), torch.zeros(1, V), torch.zeros(1))
    assert raw_score(Gate("rank", 2), teacher, teacher, draft).tolist() == [[3, 0, 1, 1, 3]]


def test_divergence_is_never_negative() -> None:
    """Rounding makes it so for near-equal models; clamped, a threshold of 0 is reached everywhere."""
    student, _ = models()
    almost = (student + 1e-9).log_softmax(-1)
    assert bool((reverse_kl(student, almost) < 0).any())
    for score in ("divergence", "forward_kl"):
        decision, _ = apply_gate(Gate(score, 0.0), student, almost, block(), GateState.start(N))
        assert bool((decision.score >= 0).all())
        assert bool(decision.rewrite.all())


def test_hard_gate_is_hard_at_equality() -> None:
    score = torch.tensor([[0.5 - 1e-12, 0.5, 0.5 + 1e-12]], dtype=torch.float64)
    decision = decide(Gate(tau=0.5), score, torch.zeros_like(score))
    assert decision.rewrite.tolist() == [[False, True, True]]
    assert decision.reverse_weight.tolist() == [[1.0, 0.0, 0.0]]


def test_soft_gate() -> None:
    """lambda is sigmoid(alpha (tau - score)), and the teacher writes with probability 1 - lambda."""
    score = torch.tensor([[0.1, 0.5, 1.3]], dtype=torch.float64)
    n = 10_000
    uniforms = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None].expand(n, 3)
    decision = decide(Gate(tau=0.5, alpha=3.0), score.expand(n, 3), uniforms)
    expected = torch.tensor([1 / (1 + math.exp(-3.0 * (0.5 - s))) for s in (0.1, 0.5, 1.3)], dtype=torch.float64)
    torch.testing.assert_close(decision.reverse_weight, expected.expand(n, 3))
    assert float((decision.rewrite.double().mean(0) - (1 - expected)).abs().max()) <= 1 / n


def test_soft_tends_to_hard() -> None:
    """As alpha grows, away from the threshold, weights and decisions become those of the hard gate."""
    student, teacher = models()
    draft = block()
    tau = float(raw_score(Gate(tau=1), student, teacher, draft).median()) + 1e-4
    hard, _ = apply_gate(Gate(tau=tau), student, teacher, draft, GateState.start(N))
    gaps = []
    for alpha in (1.0, 1e2, 1e4, 1e7):
        soft, _ = apply_gate(Gate(tau=tau, alpha=alpha), student, teacher, draft, GateState.start(N))
        gaps.append(float((soft.reverse_weight - hard.reverse_weight).abs().max()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-12
    assert soft.rewrite.equal(hard.rewrite)
    assert 0 < int(hard.rewrite.sum()) < N * K


@pytest.mark.parametrize("score_clip", [math.inf, 0.6])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.7])
@pytest.mark.parametrize("step_reduction", ["none", "mean", "max", "sum"])
def test_reading_a_score(step_reduction: str, smoothing: float, relative: bool, score_clip: float) -> None:
    """Clip, moving average or what it is a multiple of, then the causal mean, max or sum over the step so far: what a
    loop over the past gives."""
    ways: Any = {"step_reduction": step_reduction, "smoothing": smoothing, "score_clip": score_clip}
    config = Gate(tau=0.5, relative=relative, **ways)
    draft = block()
    start = draft.step_start.clone()
    start[:, 0] = True  # an answer begins with a step
    raw = raw_score(config, *models(), draft)
    actual, _ = read_score(config, raw, start, GateState.start(N))
    expected = [
        [naive_read(config, raw[i, : k + 1].tolist(), start[i, : k + 1].tolist()) for k in range(K)] for i in range(N)
    ]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert 2 < int(start.sum()) < N * K


def decide_with(config: Gate, scores: list[float]) -> GateDecision:
    """Decisions on one answer of these raw scores."""
    raw = torch.tensor([scores], dtype=torch.float64)
    start = torch.arange(len(scores))[None] == 0
    return read_and_decide(config, raw, start, torch.zeros_like(raw), GateState.start(1))[0]


def test_adaswitch_by_hand() -> None:
    """Averages before: -, 1, 2, 3. At three times the average the fourth state is hard (9 >= 3 * 3), and it and all
    that follow are the teacher's, unlooked at. The first is never hard, nor is a 0 after zeros."""
    config = Gate(tau=3.0, relative=True, hand_over_rest=True)
    decision = decide_with(config, [1.0, 3.0 - 1e-9, 5.0, 9.0, 0.0, 1.0])
    assert decision.rewrite.tolist() == [[False, False, False, True, True, True]]
    assert decision.reverse_weight.tolist() == [[1, 1, 1, 0, 0, 0]]
    assert decision.score[0, :4].tolist() == pytest.approx([0, 3, 2.5, 3])
    assert bool(decision.score[0, 4:].isnan().all())
    assert not decide_with(config, [5.0, 0.0]).rewrite.any()
    assert decide_with(config, [0.0, 0.0, 0.1]).rewrite.tolist() == [[False, False, True]]


def test_cumulative_by_hand() -> None:
    """Sums 0.5, 1, then anew 0.25, 0.75, 1.75, then 0: hard where 1 is reached; a rewritten step's score is spent."""
    decision = decide_with(Gate(tau=1.0, cumulative=True), [0.5, 0.5, 0.25, 0.5, 1.0, 0.0])
    assert decision.score.tolist() == [[0.5, 1.0, 0.25, 0.75, 1.75, 0.0]]
    assert decision.rewrite.tolist() == [[False, True, False, False, True, False]]


@pytest.mark.parametrize("budget", [0.05, 0.3])
@pytest.mark.parametrize("start", [1e-2, 50.0])
def test_the_threshold_follows_the_quantile(start: float, budget: float) -> None:
    """From far off either way, on fresh exponential scores (768 a rollout), the threshold comes to their quantile and
    the share to the budget; nothing depends on the scores' unit."""
    ends = []
    for unit in (1.0, 1000.0):
        generator, threshold, shares = torch.Generator().manual_seed(0), start * unit, []
        for _ in range(60):
            scores = unit * torch.empty(768).exponential_(generator=generator)
            shares.append(float((scores >= threshold).double().mean()))
            threshold = follow_quantile(threshold, shares[-1], budget)
        assert float(np.mean(shares[-30:])) == pytest.approx(budget, abs=0.01)
        assert threshold == pytest.approx(-math.log(budget) * unit, rel=0.15)
        ends.append(threshold / unit)
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    assert follow_quantile(2.0, budget, budget) == 2.0


gates = st.one_of(
    st.builds(
        Gate,
        score=st.sampled_from(READABLE),
        tau=st.floats(0, 2),
        alpha=st.just(math.inf) | st.floats(0.1, 50),
        step_reduction=st.sampled_from(["none", "first", "mean", "max", "sum"]),
        smoothing=st.just(0.0) | st.floats(0.01, 0.99),
        score_clip=st.just(math.inf) | st.floats(0.1, 2),
        relative=st.booleans(),
        hand_over_rest=st.booleans(),
    ),
    st.builds(
        Gate,
        score=st.sampled_from(READABLE),
        tau=st.floats(0, 4),
        alpha=st.just(math.inf) | st.floats(0.1, 50),
        smoothing=st.just(0.0) | st.floats(0.01, 0.99),
        relative=st.booleans(),
        cumulative=st.just(True),
        hand_over_rest=st.booleans(),
    ),
    st.builds(random_gate, st.floats(0, 1), st.booleans()),
)


@given(gates, st.integers(0, 2**32), st.lists(st.integers(1, K - 1), unique=True, max_size=K))
@settings(deadline=None, max_examples=60)
def test_blocks_of_any_length_decide_alike(config: Gate, seed: int, cuts: list[int]) -> None:
    """A block evaluated at once equals its parts one after the other, each row's carry handed on: scores, decisions,
    weights, and the carry at every position. In particular later tokens do not change earlier decisions."""
    student, teacher = models(seed)
    draft = block(seed)
    whole, carries = apply_gate(config, student, teacher, draft, GateState.start(N))
    carry = GateState.start(N)
    rows = torch.arange(N)
    bounds = [0, *sorted(cuts), K]
    for begin, end in itertools.pairwise(bounds):
        part = slice(begin, end)
        piece = DraftBlock(
            draft.tokens[:, part], draft.step_start[:, part], draft.uniforms[:, part], draft.episode_uniforms
        )
        decision, after = apply_gate(config, student[:, part], teacher[:, part], piece, carry)
        torch.testing.assert_close(decision.score, whole.score[:, part], rtol=0, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(decision.reverse_weight, whole.reverse_weight[:, part], rtol=0, atol=1e-12)
        assert decision.rewrite.equal(whole.rewrite[:, part])
        carry = after.at(rows, torch.full((N,), end - begin - 1))
        expected = carries.at(rows, torch.full((N,), end - 1))
        for actual, value in zip(carry, expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=0, atol=1e-12)


def test_carry_of_some_rows() -> None:
    """`put` replaces the named rows and leaves the others."""
    carry = GateState(*torch.arange(32, dtype=torch.float64).view(8, 4))
    new = carry.put(torch.tensor([2]), GateState.start(1))
    assert new.step_max.tolist() == [16.0, 17.0, 0.0, 19.0]
    assert carry.step_max.tolist() == [16.0, 17.0, 18.0, 19.0]


@pytest.mark.parametrize(
    "config",
    [
        Gate(tau=0.5),
        Gate(tau=0.5, alpha=2.0, step_reduction="mean"),
        Gate(tau=0.5, relative=True, cumulative=True, hand_over_rest=True),
    ],
)
def test_nothing_that_comes_out_has_a_gradient(config: Gate) -> None:
    """A loss must not fall by moving the gate."""
    student, teacher = (x.requires_grad_() for x in models())
    decision, carry = apply_gate(config, student, teacher, block(), GateState.start(N))
    assert not any(x.requires_grad for x in (*decision, *carry))


@pytest.mark.parametrize("per_answer", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_random_gates(rate: float, per_answer: bool) -> None:
    """They rewrite at their rate, at 0 never and at 1 always, each step or each whole answer; no model is read."""
    n = 1000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    first = torch.zeros(n, 3, dtype=torch.bool)
    draft = DraftBlock(torch.zeros(n, 3, dtype=torch.long), first, grid[torch.randperm(n)][:, None].expand(n, 3), grid)
    config = random_gate(rate, per_answer)
    decision, _ = apply_gate(config, None, None, draft, GateState.start(n))
    assert not config.needs_scores
    assert float(decision.rewrite.double().mean()) == pytest.approx(rate, abs=1 / n)
    assert (decision.reverse_weight == (~decision.rewrite).double()).all()
    if per_answer and 0 < rate < 1:
        assert decision.rewrite[:, 0].tolist() == (grid < rate).tolist()
    for extreme in (0.0, 1 - 2**-53):  # not even the smallest and the largest uniform moves the ends
        edge = DraftBlock(draft.tokens, first, torch.full((n, 3), extreme).double(), torch.full((n,), extreme).double())
        rewrite = apply_gate(config, None, None, edge, GateState.start(n))[0].rewrite
        assert bool((rewrite == bool(rate)).all()) or 0 < rate < 1


def test_infinite_threshold_reads_no_model() -> None:
    for config in (Gate(tau=math.inf), NEVER, ALWAYS):
        assert not config.needs_scores
        decision, _ = apply_gate(config, None, None, block(), GateState.start(N))
        assert bool((decision.rewrite == config.always).all())
    assert Gate(tau=0.0).needs_scores


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"tau": -0.1}, "tau"),
        ({"tau": math.nan}, "tau"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"smoothing": -0.1}, "smoothing"),
        ({"score_clip": 0.0}, "score_clip"),
        ({"cumulative": True, "step_reduction": "sum"}, "step_reduction"),
        ({"score": "uniform", "hand_over_rest": True}, "score"),
        ({"screen": "divergence"}, "screen"),
        ({"screen": "margin", "score": "student_entropy"}, "screen"),
        ({"screen": "margin", "screen_tau": -1.0}, "screen_tau"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}:") as error:
        Gate(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_bad_rate(rate: float) -> None:
    with pytest.raises(ValueError, match="rate: "):
        random_gate(rate)
