"""Metrics of completions: pure functions of tokens, grades and log-probabilities, with the papers that define them.

The end token is part of a completion, and counts in its length.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

HIGH_DIVERGENCE = 0.5  # nats; the fixed reference of high_divergence_share, whatever a gate reads
Tokens = Sequence[int]
Array = NDArray[np.float64]


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; NaN of no values."""
    values = list(values)
    return float(np.mean(values)) if values else math.nan


def accuracy(correct: Sequence[bool]) -> float:
    """The share of completions with the right final value: Cobbe et al. 2021, "Training verifiers to solve math word
    problems" (arXiv 2110.14168), "test solve rate"; NaN of no values."""
    return mean(correct)


def auroc(score: Tensor, positive: Tensor) -> float:
    """The area under the ROC curve: the probability that a positive has a larger score than a negative, ties counting
    half (Mann & Whitney 1947); NaN if there are only positives or only negatives.

    Args:
        score: [n].
        positive: bool [n].
    """
    _, inverse, counts = score.double().unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[inverse]  # the mean rank of equal scores
    n = int(positive.sum())
    others = len(positive) - n
    if n == 0 or others == 0:
        return math.nan
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * others))


def sizes_up_to(samples: int) -> list[int]:
    """The k of pass@k and majority@k: the powers of two up to the number of samples, and that number."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of k completions drawn from `samples` is right: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, "Evaluating large language models trained on code" (arXiv 2107.03374), eq. 1: unbiased.
    """
    _check_k(samples, k)
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(votes: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """The probability that the most frequent final value of k completions, drawn without replacement, is right.

    Wang et al. 2022, "Self-consistency improves chain of thought reasoning" (arXiv 2203.11171), with the mean over all
    C(n, k) draws in closed form, as for `pass_at_k`: unbiased. Equally frequent values win equally often, as if the
    first one drawn won. With k = n this is the plain majority; with k = 1, and with k = 2 if every completion has a
    value, it is the accuracy.

    Args:
        votes: the final value of each of n completions; None for a completion without one.
        correct: whether it is right. A value that was graded both ways counts by the share graded right.
        k: 1 to n. Draws without any final value are wrong.
    """
    _check_k(len(votes), k)
    counts = Counter(v for v in votes if v is not None)
    right: dict[Hashable, list[bool]] = defaultdict(list)
    for vote, is_right in zip(votes, correct, strict=True):
        right[vote].append(is_right)
    silent = len(votes) - counts.total()
    won = {}
    for count in set(counts.values()):
        others = list(counts.values())
        others.remove(count)
        won[count] = _draws_won(count, others, silent, k)
    return sum(won[c] * mean(right[v]) for v, c in counts.items()) / math.comb(len(votes), k)


def _draws_won(own: int, others: Sequence[int], silent: int, k: int) -> float:
    """The number of draws of k in which a value of `own` completions wins; a tie of m counts 1/m.

    `others` are the counts of the other values, `silent` that of completions without a value.
    """
    total = 0.0
    for j in range(1, min(own, k) + 1):
        rest = k - j
        ways = np.zeros((rest + 1, rest // j + 1))  # [completions drawn from the rest, other values that also have j]
        ways[0, 0] = 1.0
        for count in others:
            drawn = range(min(count, j) + 1)
            ways = np.sum([_shift(ways, i, int(i == j)) * math.comb(count, i) for i in drawn], 0)
        ways = np.sum([_shift(ways, i, 0) * math.comb(silent, i) for i in range(min(silent, rest) + 1)], 0)
        total += math.comb(own, j) * float((ways[rest] / np.arange(1, ways.shape[1] + 1)).sum())
    return total


def _shift(ways: Array, rows: int, columns: int) -> Array:
    """Shift down and to the right, filling up with zeros."""
    n, m = ways.shape
    return np.pad(ways, ((rows, 0), (columns, 0)))[:n, :m]


def _check_k(samples: int, k: int) -> None:
    if not 0 < k <= samples:
        raise ValueError(f"k: {k}; expected 1 to the number of samples, {samples}")


def count_steps(tokens: Tokens, step_ends: Collection[int], end: int) -> int:
    """Reasoning steps of a completion: Fu et al. 2022, "Complexity-based prompting" (arXiv 2210.00720), count lines.

    Args:
        tokens: the completion.
        step_ends: tokens that end a reasoning step. A step without other tokens, such as an empty line, is not counted.
        end: the end token, which is not a step either.
    """
    steps, inside = 0, False
    for token in tokens:
        closes = token in step_ends or token == end
        steps += closes and inside
        inside = not closes
    return steps + inside


def perplexity(log_probs: Sequence[float]) -> float:
    """exp of the mean negative log-likelihood of tokens, nats: Jelinek et al. 1977, "Perplexity - a measure of the
    difficulty of speech recognition tasks"; NaN of no tokens."""
    return math.exp(min(-mean(log_probs), 700.0)) if len(log_probs) else math.nan


def exposure_gap(own: Sequence[float], teachers: Sequence[float]) -> float:
    """Mean D_t on the student's own prefixes minus mean D_t on the teacher's prefixes, nats per token.

    Arora et al. 2022, "Why exposure bias matters" (arXiv 2204.01171), call this difference, in per cent, the excess
    accumulated error. Here the error of a token is D_t = KL(student || teacher). The gap is 0 if the student's errors
    do not lead it to states where it makes more errors.
    """
    return mean(own) - mean(teachers)


def share_by_part(flags: Sequence[Sequence[bool]], parts: int = 4) -> list[float]:
    """The share of flagged positions in each of the equal parts of a completion, over all completions.

    Token t of T is in part floor(parts t / T), so completions of all lengths count in every part.

    Args:
        flags: a flag per position of each completion.
        parts: the number of parts.
    """
    in_part: list[list[bool]] = [[] for _ in range(parts)]
    for completion in flags:
        for t, flag in enumerate(completion):
            in_part[parts * t // len(completion)].append(flag)
    return [mean(f) for f in in_part]


def distinct_n(sequences: Sequence[Tokens], n: int) -> float:
    """Distinct n-grams over all n-grams: Li et al. 2016, "A diversity-promoting objective" (arXiv 1510.03055)."""
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(completions: Sequence[Tokens]) -> float:
    """The mean BLEU-4 of each completion with all others as its references, in [0, 1]; 1 if all are the same.

    Zhu et al. 2018, "Texygen" (arXiv 1802.01886), for the completions of one prompt. Token ids are the words. BLEU is
    sacrebleu's sentence BLEU, with exponential smoothing and without the n-grams that a completion is too short for.
    NaN without sacrebleu (the extra `metrics`), or for fewer than two completions.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return math.nan
    if len(completions) < 2:
        return math.nan
    bleu = BLEU(tokenize="none", effective_order=True)
    texts = Counter(" ".join(map(str, a)) for a in completions)
    scores = {}
    for text, count in texts.items():  # equal completions have equal scores, and BLEU counts a reference once
        others = [other for other in texts if other != text or count > 1]
        scores[text] = 1.0 if count > 1 else bleu.sentence_score(text, others).score / 100
    return sum(scores[text] * count for text, count in texts.items()) / len(completions)


def distinct_answers(completions: Sequence[Tokens]) -> float:
    """The number of distinct completions among the k of one prompt, divided by k; 1 / k is collapse.

    The per-input diversity of Kirk et al. 2023, "Understanding the effects of RLHF" (arXiv 2310.06452); two completions
    are similar if all their tokens are equal.
    """
    return len(set(map(tuple, completions))) / len(completions) if len(completions) else math.nan


def is_collapsed(completions: Sequence[Tokens]) -> bool:
    """Whether all completions of a prompt are the same, token for token: complete mode collapse."""
    return len(set(map(tuple, completions))) == 1


def repeated_share(tokens: Tensor, n: int = 4) -> Tensor:
    """The share of a completion's n-grams that repeat an earlier one: [N, T] padded with -1 -> [N]; 0 without n-grams.

    seq-rep-n of Welleck et al. 2019, "Neural text generation with unlikelihood training" (arXiv 1908.04319).
    """
    if tokens.shape[1] < n:
        return torch.zeros(len(tokens))
    grams = tokens.unfold(1, n, 1)  # [N, T - n + 1, n]
    hashes = torch.zeros_like(grams[..., 0])
    for column in grams.unbind(-1):
        hashes = hashes * 6364136223846793005 + column + 1  # a hash modulo 2^64; collisions are very rare
    whole = grams[..., -1] >= 0
    hashes = hashes.masked_fill(~whole, torch.iinfo(torch.long).max).sort(1).values
    count = whole.sum(1)
    first = torch.ones_like(hashes, dtype=torch.bool)
    first[:, 1:] = hashes[:, 1:] != hashes[:, :-1]
    distinct = (first & (torch.arange(hashes.shape[1]) < count[:, None])).sum(1)
    return torch.where(count > 0, 1 - distinct / count.clamp(min=1), 0.0)


def repetitions(completions: Sequence[Tokens], n: int = 4) -> list[float]:
    """`repeated_share` of completions of any lengths."""
    if not completions:
        return []
    padded = pad_sequence([torch.tensor(a, dtype=torch.long) for a in completions], True, -1)
    return repeated_share(padded, n).tolist()
