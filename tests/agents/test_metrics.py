"""Each metric against its definition: by hand, by enumeration, or by what may not change it."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import metrics
from agents.metrics import majority_at_k, pass_at_k

few = settings(max_examples=25, deadline=None)
ANSWERS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=2, max_size=6)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (8, 3, 8), (8, 7, 2)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, c: int, k: int) -> None:
    """By enumeration of all draws of k answers without replacement."""
    draws = list(itertools.combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(i < c for i in draw) for draw in draws]))


def test_k_is_at_most_the_number_of_samples() -> None:
    with pytest.raises(ValueError, match=r"^k: 3"):
        pass_at_k(2, 1, 3)
    with pytest.raises(ValueError, match=r"^k: 0"):
        majority_at_k(["1", "2"], [True, False], 0)


@few
@given(st.integers(1, 100))
def test_k_goes_up_to_the_number_of_samples(samples: int) -> None:
    sizes = metrics.sizes_up_to(samples)
    assert sizes[0] == 1
    assert sizes[-1] == samples
    assert all(k & (k - 1) == 0 for k in sizes[:-1])
    assert all(b <= 2 * a for a, b in itertools.pairwise(sizes))


@few
@given(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=7), st.data())
def test_majority_at_k_is_the_share_of_draws_whose_winner_is_right(
    votes: list[str | None], data: st.DataObject
) -> None:
    """By enumeration of all draws and of all their tied winners."""
    k = data.draw(st.integers(1, len(votes)))
    correct = [v == "a" for v in votes]
    total = 0.0
    for draw in itertools.combinations(votes, k):
        counts = Counter(v for v in draw if v is not None)
        winners = [v for v, c in counts.items() if c == max(counts.values())]
        total += winners.count("a") / len(winners) if winners else 0.0
    assert majority_at_k(votes, correct, k) == pytest.approx(total / math.comb(len(votes), k))


@few
@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=6))
def test_the_first_drawn_of_equally_frequent_values_wins_as_often_as_any(votes: list[str]) -> None:
    """By enumeration of all orders in which all are drawn: `Counter.most_common` keeps the first one in front."""
    winners = [Counter(order).most_common(1)[0][0] for order in itertools.permutations(votes)]
    expected = winners.count("a") / len(winners)
    assert majority_at_k(votes, [v == "a" for v in votes], len(votes)) == pytest.approx(expected)


@few
@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=30))
def test_one_vote_or_two_are_the_accuracy(votes: list[str]) -> None:
    correct = [v == "a" for v in votes]
    for k in (1, 2):
        assert majority_at_k(votes, correct, k) == pytest.approx(metrics.accuracy(correct))


def test_a_majority_of_many_against_what_it_is_made_of() -> None:
    """64 answers: 33 right ones always win, 31 against 33 never do, 64 different ones share."""
    assert majority_at_k(["a"] * 33 + ["b"] * 31, [True] * 33 + [False] * 31, 64) == 1
    assert majority_at_k(["a"] * 31 + ["b"] * 33, [True] * 31 + [False] * 33, 64) == 0
    different = [str(i) for i in range(64)]
    assert majority_at_k(different, [v == "7" for v in different], 32) == pytest.approx(1 / 64)
    assert majority_at_k(["a", "a"], [True, False], 2) == 0.5  # graded in both ways


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [
        ([7, 7, 12, 2, 9, 12, 9, 8, 13], 3),
        ([7, 7, 12, 12, 12, 2, 9, 12, 13], 2),  # empty lines, and the end after a line's end
        ([7, 7], 1),  # cut off
        ([13], 0),
        ([], 0),
        ([12, 12], 0),
    ],
)
def test_steps_are_lines_that_hold_something(tokens: list[int], steps: int) -> None:
    assert metrics.count_steps(tokens, {12}, 13) == steps


def test_perplexity_and_the_exposure_gap_by_hand() -> None:
    assert metrics.perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4)
    assert metrics.perplexity([-1e9]) == math.exp(700)
    assert math.isnan(metrics.perplexity([]))
    assert metrics.exposure_gap([0.5, 1.5, 1.0], [0.25, 0.75]) == pytest.approx(0.5)
    assert math.isnan(metrics.exposure_gap([], []))


def test_hard_shares_by_hand() -> None:
    flags = [[False, True, True, True, True, True, False, False], [True], [False, True]]
    # quarters of the first: 0 1 | 1 1 | 1 1 | 0 0; the lone token is in the first, those of the pair in 1 and 3
    assert metrics.share_by_part(flags) == [2 / 4, 1, 1, 0]
    assert math.isnan(metrics.share_by_part([[True]])[3])


@few
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(1, 5))
def test_the_parts_make_up_the_whole(flags: list[list[bool]], parts: int) -> None:
    """The mean of the parts' shares, weighted by their sizes, is the share of all positions."""
    shares = metrics.share_by_part(flags, parts)
    sizes = [sum(parts * t // len(f) == p for f in flags for t in range(len(f))) for p in range(parts)]
    whole = sum(share * size for share, size in zip(shares, sizes, strict=True) if size) / sum(sizes)
    assert whole == pytest.approx(metrics.mean(x for f in flags for x in f))


def test_distinct_n_counts_n_grams() -> None:
    assert metrics.distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # 12, 21, 12, 12
    assert metrics.distinct_n([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert metrics.distinct_n([[1, 2, 1, 2], [1, 2]], 3) == 1
    assert math.isnan(metrics.distinct_n([[1]], 2))


def test_shares_of_distinct_answers() -> None:
    assert metrics.distinct_answers([[1], [1, 2], [1], [2]]) == 3 / 4
    assert not metrics.is_collapsed([[1], [1, 2]])
    assert metrics.is_collapsed([[1, 2], [1, 2]])
    assert metrics.is_collapsed([[1, 2]] * 4) == (metrics.distinct_answers([[1, 2]] * 4) == 1 / 4)


def test_self_bleu_by_hand() -> None:
    """Two answers that share three tokens of four, in a row: precisions 3/4, 2/3, 1/2 and, smoothed, 1/2 of 1."""
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert metrics.self_bleu([[1, 2, 3, 4], [1, 2, 3, 5]]) == pytest.approx(expected)
    assert metrics.self_bleu([[1, 2, 3, 4], [5, 6, 7, 8]]) == 0
    assert math.isnan(metrics.self_bleu([[1, 2, 3, 4]]))


@few
@given(ANSWERS, st.permutations(range(4)), st.randoms())
def test_self_bleu_depends_on_neither_ids_nor_order(answers: list[list[int]], names: list[int], random: object) -> None:
    value = metrics.self_bleu(answers)
    assert 0 <= value <= 1 + 1e-12
    assert metrics.self_bleu([[100 + names[t] for t in a] for a in answers[::-1]]) == pytest.approx(value)
    assert metrics.self_bleu([answers[0]] * 3) == 1


@few
@given(ANSWERS)
def test_self_bleu_is_the_mean_over_answers_with_the_others_as_references(answers: list[list[int]]) -> None:
    """sacrebleu asked for every one."""
    from sacrebleu.metrics import BLEU

    bleu, texts = BLEU(tokenize="none", effective_order=True), [" ".join(map(str, a)) for a in answers]
    scores = [bleu.sentence_score(t, texts[:i] + texts[i + 1 :]).score / 100 for i, t in enumerate(texts)]
    assert metrics.self_bleu(answers) == pytest.approx(np.mean(scores))


def test_without_sacrebleu_self_bleu_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    assert math.isnan(metrics.self_bleu([[1, 2], [1, 2]]))


@few
@given(ANSWERS)
def test_repetition_counts_n_grams_that_repeat_an_earlier_one(answers: list[list[int]]) -> None:
    expected = []
    for answer in answers:
        grams = [tuple(answer[i : i + 2]) for i in range(len(answer) - 1)]
        expected.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    assert metrics.repetitions(answers, n=2) == pytest.approx(expected)
    assert metrics.repetitions([], n=2) == []
    assert metrics.repeated_share(torch.tensor([[1, 2, 1, 2, 1, -1]]), 2).tolist() == [0.5]  # 12 21 12 21


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_the_chance_to_rank_a_pair_right(pairs: list[tuple[int, bool]]) -> None:
    """Ties count half; without a pair there is none."""
    score, positive = torch.tensor([s for s, _ in pairs]), torch.tensor([p for _, p in pairs])
    right = [(a > b) + (a == b) / 2 for a, p in pairs for b, q in pairs if p and not q]
    assert metrics.auroc(score, positive) == pytest.approx(float(np.mean(right)) if right else math.nan, nan_ok=True)
