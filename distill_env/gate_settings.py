"""The settings of a gate. Light to import: the functions that read them are in `gate.py`."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

from distill_env.checks import Positive, Range, check_fields

STUDENT_SCORES = ("student_entropy", "least_confidence", "margin", "predicted_divergence")  # read the student alone
SCORE_NAMES = ("divergence", "forward_kl", "jensen_shannon", "teacher_entropy", "rank", *STUDENT_SCORES)
ScoreFunction = Callable[..., Any]
"""(student), (student, teacher) or (student, teacher, tokens) -> scores: log-probabilities [n, K, V], perhaps twice,
perhaps the drafted tokens [n, K], to numbers [n, K]. The number of its parameters says what a score reads."""
SMALLEST_TAU = 1e-6  # that is chosen from scores, so that positions with a score of 0 are easy
StepReduction = Literal["none", "first", "mean", "max", "sum"]


@dataclass(frozen=True)
class Gate:
    """The gate: a score, a threshold and a sharpness. A position is hard if `score >= tau`.

    A hard gate (alpha = inf) rewrites hard positions. The reverse KL has weight 1 at easy positions and 0 at hard ones.

    A soft gate (alpha < inf) rewrites with probability 1 - lambda, where lambda = sigmoid(alpha (tau - score)). The
    reverse KL has weight lambda.

    Raises:
        ValueError: if a setting is out of range, or if two settings exclude each other.
    """

    score: str = "divergence"
    """What the gate reads: divergence (D_t), forward_kl, jensen_shannon or teacher_entropy, all in nats; rank, the
    drafted token's rank under the teacher (0 is the most likely); of the student alone student_entropy,
    least_confidence, margin or predicted_divergence; or your own package.module:function."""
    tau: float | Literal["auto"] = math.inf
    """Threshold, in the unit of the score: nats, ranks, or (with relative) multiples of the average. auto lets the
    agent choose it before its first iteration, so that a tenth of the positions is hard."""
    alpha: Positive = math.inf
    """Sharpness of a soft gate, per unit of the score."""
    step_reduction: StepReduction = "none"
    """Reduction of the score over the reasoning step; first is the score at the step's first token, which then decides
    for the whole step; the others are over the step so far."""
    smoothing: Annotated[float, Range(least=0, below=1)] = 0.0
    """Weight of the past in an exponential moving average of the score, in [0, 1)."""
    score_clip: Positive = math.inf
    """Upper limit of the score; larger scores are clipped to it."""
    relative: bool = False
    """Divide the score by the average of the scores before it in the completion; the first one reads 0."""
    cumulative: bool = False
    """Sum the score since the last rewrite; tau is then a budget for each stretch between rewrites."""
    hand_over_rest: bool = False
    """From the first hard position on, the teacher writes the rest of the completion."""
    screen: str = ""
    """A score of the student alone that picks where the gate asks the teacher; elsewhere its score is 0. Empty asks
    everywhere."""
    screen_tau: Annotated[float, Range(least=0, finite=True)] = 0.0
    """Threshold of the screen, in the unit of that score."""

    def __post_init__(self) -> None:
        if callable(self.score):
            object.__setattr__(self, "score", custom_score(self.score))
        check_fields(self)
        if self.reads_a_model and self.score not in SCORE_NAMES:
            find_score(self.score)
        if self.tau == "auto":
            if self.feeds_back or not self.reads_a_model:
                raise ValueError("tau: 'auto' with cumulative or hand_over_rest; expected a number")
        elif self.reads_a_model and self.tau < 0:
            raise ValueError(f"tau: {self.tau} is negative; expected at least 0 with score {self.score!r}")
        if self.cumulative and self.step_reduction != "none":
            raise ValueError(f"step_reduction: {self.step_reduction!r} with cumulative; expected none")
        if self.has_memory and not self.reads_a_model:
            raise ValueError(f"score: {self.score!r} with a gate that has memory; expected a score of the models")
        if self.screen and not (self.reads_a_model and reads(self.screen) == 1 < reads(self.score)):
            raise ValueError(
                f"screen: {self.screen!r} with score {self.score!r}; expected a score of the student alone "
                f"({', '.join(STUDENT_SCORES)}), and a gate that reads the teacher"
            )

    @property
    def threshold(self) -> float:
        """`tau` as a number.

        Raises:
            ValueError: if it is still auto.
        """
        if self.tau == "auto":
            raise ValueError("tau: 'auto' before an agent has chosen it; expected a number")
        return self.tau

    @property
    def reads_a_model(self) -> bool:
        """Whether the score is a function of the models; otherwise it is a uniform random number."""
        return not isinstance(self, RandomGate)

    @property
    def reads_tokens(self) -> bool:
        """Whether the score depends on the drafted token, not only on the two distributions."""
        return self.reads_a_model and reads(self.score) > 2

    @property
    def reads_teacher(self) -> bool:
        """Whether a decision needs the teacher's distribution; otherwise the student knows when to call it."""
        return self.needs_scores and reads(self.score) > 1

    @property
    def student_score(self) -> str:
        """The score of the student alone that the gate reads: its only one, or its screen; empty if there is none."""
        return self.screen if self.reads_teacher else self.score * self.needs_scores

    @property
    def needs_scores(self) -> bool:
        """Whether a decision needs the models; otherwise it is known before anything is drafted."""
        return self.reads_a_model and (self.tau == "auto" or math.isfinite(self.tau))

    @property
    def has_memory(self) -> bool:
        """Whether a decision depends on the states before."""
        return self.smoothing > 0 or self.step_reduction != "none" or self.relative or self.feeds_back

    @property
    def feeds_back(self) -> bool:
        """Whether a decision depends on the decisions before."""
        return self.cumulative or self.hand_over_rest

    @property
    def always(self) -> bool:
        return self.tau == -math.inf

    @property
    def never(self) -> bool:
        return self.tau == math.inf


@dataclass(frozen=True)
class RandomGate(Gate):
    """A gate that reads a uniform random number, of each position or (episode_uniform) of each whole completion."""

    score: Literal["uniform", "episode_uniform"] = "uniform"


_custom_scores: dict[str, ScoreFunction] = {}


def custom_score(function: ScoreFunction) -> str:
    """The name of a score of your own, as `Gate(score=function)` stores it: `package.module:function`, and a number if
    another function has that name, as when a cell of a notebook runs again.

    Args:
        function: pure; takes `student` and `teacher`, log-probabilities [n, K, V], and perhaps `tokens` [n, K], and
            returns numbers [n, K]. A position may depend on itself and on those before it.
    """
    first = f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"
    names = itertools.chain([first], (f"{first}#{i}" for i in itertools.count(2)))
    return next(name for name in names if _custom_scores.setdefault(name, function) is function)


def find_score(name: str) -> ScoreFunction:
    """The function of that name, `package.module:function`, or one that `custom_score` has named.

    Raises:
        ValueError: if there is none.
    """
    if name not in _custom_scores:
        accepted = f"expected {', '.join(SCORE_NAMES)} or package.module:function"
        if ":" not in name:
            raise ValueError(f"score: {name!r} is unknown; {accepted}")
        try:
            function = resolve_name(name.partition("#")[0])
        except Exception as error:  # a module may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"score: {name!r} cannot be imported ({reason}); {accepted}") from None
        if not callable(function):
            raise ValueError(f"score: {name!r} is a {type(function).__name__}; {accepted}")
        _custom_scores[name] = function
    return _custom_scores[name]


def reads(score: str) -> int:
    """What a score reads: 1 the student, 2 also the teacher, 3 also the drafted tokens.

    Raises:
        ValueError: if there is no such score.
    """
    if score in SCORE_NAMES:
        return 1 if score in STUDENT_SCORES else 3 if score == "rank" else 2
    return min(len(inspect.signature(find_score(score)).parameters), 3)


NEVER = RandomGate(tau=math.inf)
ALWAYS = RandomGate(tau=-math.inf)


def random_gate(rate: float, per_completion: bool = False) -> Gate:
    """Rewrite each position, or each whole completion, with probability `rate`."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: {rate}; expected a number in [0, 1]")
    if rate in (0, 1):
        return ALWAYS if rate else NEVER
    return RandomGate("episode_uniform" if per_completion else "uniform", 1 - rate)
