"""Metrics of answers: pure functions of tokens, grades and log-probabilities, each with the paper that defines it.

An answer's tokens are taken as written: the end token counts, as it does in its length.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HIGH_DIVERGENCE = 0.5  # nats; the fixed reference of high_divergence_share, whatever a gate reads
Tokens = Sequence[int]
Array = NDArray[np.float64]


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; nan of nothing."""
    known = list(values)
    return float(np.mean(known)) if known else math.nan


# ---------------------------------------------------------------------- right answers


def accuracy(correct: Sequence[bool]) -> float:
    """The share of answers with the right final value: Cobbe et al. 2021, "Training verifiers to solve math word
    problems" (arXiv 2110.14168), `test solve rate`; nan of nothing."""
    return mean(correct)


def sizes_up_to(samples: int) -> list[int]:
    """The k at which pass@k and majority@k are told: the powers of two, and all samples."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k answers drawn from `samples` is right: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, "Evaluating large language models trained on code" (arXiv 2107.03374), eq. 1: unbiased.
    """
    _check_k(samples, k)
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(votes: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """The chance that the most frequent final value of k answers, drawn without replacement, is right.

    Wang et al. 2022, "Self-consistency improves chain of thought reasoning" (arXiv 2203.11171), with the mean over all
    C(n, k) draws in closed form, as `pass_at_k` takes it: unbiased. Values that are equally frequent win equally often,
    which is what "the one that was drawn first" comes to. With k = n it is the plain majority, with k = 1 and, if all
    vote, with k = 2 the accuracy.

    Args:
        votes: the final value of each of n answers; None for an answer without one, which does not vote.
        correct: whether it is right; of a value that was graded in both ways, the share that was right counts.
        k: 1 to n; draws of which nobody votes are wrong.
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
    """In how many draws of k a value of `own` answers wins, ties in parts; `others` are the counts of its rivals."""
    total = 0.0
    for j in range(1, min(own, k) + 1):
        rest = k - j
        ways = np.zeros((rest + 1, rest // j + 1))  # [answers drawn from the rest, rivals that also have j]
        ways[0, 0] = 1.0
        for count in others:
            taken = range(min(count, j) + 1)
            ways = _total(_shift(ways, i, int(i == j)) * math.comb(count, i) for i in taken)
        ways = _total(_shift(ways, i, 0) * math.comb(silent, i) for i in range(min(silent, rest) + 1))
        total += math.comb(own, j) * float((ways[rest] / np.arange(1, ways.shape[1] + 1)).sum())
    return total


def _total(arrays: Iterable[Array]) -> Array:
    return np.sum(list(arrays), 0)


def _shift(ways: Array, rows: int, columns: int) -> Array:
    """Moved down and to the right, zeros coming in; what leaves cannot come back."""
    moved = np.zeros_like(ways)
    n, m = ways.shape
    moved[rows:, columns:] = ways[: max(n - rows, 0), : max(m - columns, 0)]
    return moved


def _check_k(samples: int, k: int) -> None:
    if not 0 < k <= samples:
        raise ValueError(f"k: {k}; accepted: 1 to the number of samples, {samples}")


def count_steps(tokens: Tokens, step_ends: Collection[int], end: int) -> int:
    """Reasoning steps of an answer: Fu et al. 2022, "Complexity-based prompting" (arXiv 2210.00720), who count lines.

    Args:
        tokens: the answer.
        step_ends: tokens that end a step; a step of nothing else, as an empty line, is none.
        end: the end token, which is no step of its own.
    """
    steps, inside = 0, False
    for token in tokens:
        closes = token in step_ends or token == end
        steps += closes and inside
        inside = not closes
    return steps + inside


# ---------------------------------------------------------------------- likelihood and divergence


def perplexity(log_probs: Sequence[float]) -> float:
    """exp of the mean negative log-likelihood of tokens, nats: Jelinek et al. 1977, "Perplexity - a measure of the
    difficulty of speech recognition tasks"; nan of nothing."""
    return math.exp(min(-mean(log_probs), 700.0)) if len(log_probs) else math.nan


def exposure_gap(own: Sequence[float], teachers: Sequence[float]) -> float:
    """Mean D_t after prefixes that the student wrote less that after prefixes of the teacher, nats a token.

    The difference on which the excess accumulated error of Arora et al. 2022, "Why exposure bias matters"
    (arXiv 2204.01171) rests, here with D_t = KL(student || teacher) as the error of a step and not in per cent:
    0 if errors do not bring the student to states where it errs more.
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


# ---------------------------------------------------------------------- diversity and degeneration


def distinct_n(sequences: Sequence[Tokens], n: int) -> float:
    """Distinct n-grams over all n-grams: Li et al. 2016, "A diversity-promoting objective" (arXiv 1510.03055)."""
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(answers: Sequence[Tokens]) -> float:
    """The mean BLEU-4 of each answer with all others as its references, in [0, 1]: 1 if all are the same.

    Zhu et al. 2018, "Texygen" (arXiv 1802.01886), among the answers to one prompt. Token ids are the words, so no
    tokenizer matters; BLEU is sacrebleu's for sentences (exponential smoothing, orders that an answer is too short for
    left out). nan without sacrebleu (the extra `metrics`), or for fewer than two answers.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return math.nan
    if len(answers) < 2:
        return math.nan
    bleu = BLEU(tokenize="none", effective_order=True)
    texts = Counter(" ".join(map(str, a)) for a in answers)
    scores = {}
    for text, count in texts.items():  # equal answers have equal scores, and a reference counts once
        others = [other for other in texts if other != text or count > 1]
        scores[text] = 1.0 if count > 1 else bleu.sentence_score(text, others).score / 100
    return sum(scores[text] * count for text, count in texts.items()) / len(answers)


def distinct_answers(answers: Sequence[Tokens]) -> float:
    """Distinct answers among k to one prompt, over k.

    The per-input diversity of Kirk et al. 2023, "Understanding the effects of RLHF" (arXiv 2310.06452), with being the
    same, token for token, as the similarity. 1 / k is collapse, 1 no repetition.
    """
    return len({tuple(a) for a in answers}) / len(answers) if len(answers) else math.nan


def is_collapsed(answers: Sequence[Tokens]) -> bool:
    """All answers to a prompt are the same, token for token: mode collapse at its end; `distinct_answers` = 1 / k."""
    return len({tuple(a) for a in answers}) == 1


def repeated_share(tokens: Tensor, n: int = 4) -> Tensor:
    """The share of an answer's n-grams that stand in it before, [N, T] padded with -1 -> [N]; 0 if it has none.

    seq-rep-n of Welleck et al. 2019, "Neural text generation with unlikelihood training" (arXiv 1908.04319).
    """
    if tokens.shape[1] < n:
        return torch.zeros(len(tokens))
    grams = tokens.unfold(1, n, 1)  # [N, T - n + 1, n]
    names = torch.zeros_like(grams[..., 0])
    for column in grams.unbind(-1):
        names = names * 6364136223846793005 + column + 1  # modulo 2^64: two n-grams hardly ever share a name
    whole = grams[..., -1] >= 0
    names = names.masked_fill(~whole, torch.iinfo(torch.long).max).sort(1).values
    count = whole.sum(1)
    first = torch.ones_like(names, dtype=torch.bool)
    first[:, 1:] = names[:, 1:] != names[:, :-1]
    distinct = (first & (torch.arange(names.shape[1]) < count[:, None])).sum(1)
    return torch.where(count > 0, 1 - distinct / count.clamp(min=1), 0.0)


def repetitions(answers: Sequence[Tokens], n: int = 4) -> list[float]:
    """`repeated_share` of answers of any lengths."""
    width = max(map(len, answers), default=0)
    padded = torch.full((len(answers), width), -1)
    for row, answer in zip(padded, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer, dtype=torch.long)
    return repeated_share(padded, n).tolist()
