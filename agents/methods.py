"""The methods: one table. A method says who writes, which loss is minimised, and how two KLs are weighted."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from distill_env.checks import Natural, Positive, Range, Share, check_fields
from distill_env.gate_settings import ALWAYS, NEVER, Gate, random_gate

TeacherWrites = Literal["never", "always", "hard", "soft", "random", "mixture", "matched", "reference"]
Loss = Literal[
    "nll",
    "forward",
    "reverse",
    "jensen_shannon",
    "skew_forward",
    "skew_reverse",
    "todi",
    "akl",
    "weighted",
    "reverse_plus_forward",
    "negative",
]
Weighting = Literal["by_writer", "hard", "soft", "constant"]
Estimator = Literal["exact", "sampled"]
Mix = Annotated[float, Range(above=0, below=1)]
Temperature = Annotated[float, Range(above=0, finite=True)]

GATED_LOSSES = ("weighted", "reverse_plus_forward", "negative")  # those that read the weighting
TOKEN_BY_TOKEN = ("todi", "akl")  # losses that weigh each token of the vocabulary by itself


@dataclass(frozen=True)
class Method:
    """The method. Every field of a row of METHODS can be overridden.

    Raises:
        ValueError: for fields out of range or that exclude each other.
    """

    teacher_writes: TeacherWrites = "hard"
    """Which tokens the teacher writes: never; always; where the gate is hard or soft; with probability teacher_rate per
    token (random) or per completion (mixture); at random, but as often as the hard gate rewrites in a trial rollout on
    the same prompts (matched); or reference completions instead (reference)."""
    loss: Loss = "weighted"
    """Loss at each position: negative log-likelihood (nll), a divergence, reverse and forward KL weighted by the gate
    (weighted), reverse KL plus the gate's share of the forward KL (reverse_plus_forward), or the log-likelihood of the
    student's tokens at hard positions (negative)."""
    weighting: Weighting = "by_writer"
    """Weight of the reverse KL in a gated loss: 1 on the student's tokens and 0 on the teacher's (by_writer), by the
    hard gate (hard), lambda = sigmoid(alpha (tau - score)) (soft), or reverse_weight at every position (constant)."""
    reverse_weight: Share = 0.86
    """Weight of the reverse KL with weighting constant."""
    gate: Gate = field(default_factory=lambda: Gate(tau=0.5, alpha=8.0))
    budget: float = 0.0
    """Target share of hard positions, in [0, 1): tau is adapted after every iteration; 0 keeps tau."""
    teacher_rate: Share = 0.5
    """Probability that the teacher writes, for random and mixture."""
    teacher_rate_anneal: Natural = 0
    """Iterations over which teacher_rate falls linearly to 0; 0 keeps it."""
    forward_kl_anneal: Natural = 0
    """Iterations over which a weighted loss's forward KL fades into the reverse KL; 0 keeps it."""
    beta: Mix = 0.5
    """Weight of the teacher in the mixture of the Jensen-Shannon divergence, in (0, 1)."""
    skew: Mix = 0.1
    """Mixing weight of a skew KL, in (0, 1)."""
    temperature: Temperature = 1.0
    """Temperature at which the student draws its tokens in a rollout. Gates, rewards, losses and evaluations read its
    distribution at 1."""
    loss_temperature: Temperature = 1.0
    """Temperature T of both distributions in a divergence. The loss is multiplied by T^2. Gates, D_t and rewards read
    them at 1."""
    loss_clip: Positive = math.inf
    """Upper limit of the loss at a position, in nats; larger losses are scaled down to it."""
    top_k: Natural = 0
    """Truncate the loss to the teacher's k most likely tokens and a tail bucket; 0 uses all tokens. The gate reads all
    that the teacher returns."""
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    """The same to the smallest set of tokens with this mass; 1 uses all tokens."""
    estimator: Estimator = "exact"
    """Gradient at each position: in closed form over the vocabulary (exact), or by the score function from the rewards
    (sampled)."""
    gamma: Share = 0.0
    """Discount of later costs, in [0, 1]; 0 gives the per-token objective, 1 the sequence-level one."""
    length_normalize: bool = False
    """Divide later costs by the number of later tokens. Long completions then do not weigh more."""
    importance_weights: bool = False
    """Weight every token by q divided by its probability under the random mixture, so that the teacher's tokens also
    carry a policy gradient."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.gate.reads_a_model:
            raise ValueError(f"score: {self.gate.score!r}; expected a score of the models")
        if self.forward_kl_anneal and self.loss != "weighted":
            raise ValueError(f"forward_kl_anneal: {self.forward_kl_anneal} with loss {self.loss!r}; expected weighted")
        if self.gate.reads_tokens and self.truncates:
            raise ValueError(f"score: {self.gate.score!r} with top_k or top_p; it needs the whole distribution")
        if self.loss in TOKEN_BY_TOKEN and self.truncates:
            raise ValueError(f"loss: {self.loss!r} with top_k or top_p; it needs the teacher's whole distribution")
        if self.loss == "negative" and self.teacher_writes != "never":
            raise ValueError(f"teacher_writes: {self.teacher_writes!r} with loss negative; expected never")
        if self.weighting == "soft" and self.gate.feeds_back:
            raise ValueError("weighting: 'soft' with cumulative or hand_over_rest; expected by_writer or hard")
        if self.budget and not (0 < self.budget < 1 and self.gated and self._adaptable):
            raise ValueError(
                f"budget: {self.budget} with teacher_writes {self.teacher_writes!r} and tau {self.gate.tau}; expected "
                "a share in (0, 1), a gate that decides who writes or weighs the loss, and a positive, finite tau"
            )
        self._check_temperatures()
        if self.estimator == "sampled":
            self._check_sampled()
        if self.importance_weights:
            self._check_importance_weights()
        if self.policy_gradient and self.gate_writes and self.gate.reads_tokens:
            raise ValueError(
                f"score: {self.gate.score!r} with gamma {self.gamma} and estimator {self.estimator!r}; it depends on "
                "the drawn token, which biases a policy gradient; expected gamma 0 and exact, or a score of the state"
            )

    @property
    def _adaptable(self) -> bool:
        """Whether a budget can adapt tau."""
        return self.gate.tau == "auto" or 0 < self.gate.tau < math.inf

    @property
    def truncates(self) -> bool:
        """Whether divergences are taken on a truncated support."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def gate_writes(self) -> bool:
        """Whether the gate decides who writes."""
        return self.teacher_writes in ("hard", "soft")

    @property
    def reads_in_rollout(self) -> bool:
        """Whether the gate is read while completions are written, when the teacher's distributions are whole: it
        decides who writes, or the update has truncated ones of the student's own completions."""
        own = self.teacher_writes == "never" and self.truncates
        return self.gate_writes or (own and self.gate.reads_teacher and not self.gate.feeds_back)

    @property
    def gated(self) -> bool:
        """Whether anything depends on the gate."""
        return self.gate_writes or self.weighting_gate is not None

    @property
    def policy_gradient(self) -> bool:
        """Whether the loss has a policy gradient."""
        return self.gamma > 0 or self.estimator == "sampled"

    @property
    def needs_teacher(self) -> bool:
        """Whether the update reads the teacher's distributions."""
        return self.loss != "nll" if self.teacher_writes == "reference" else self.estimator == "exact"

    @property
    def cacheable(self) -> bool:
        """Whether the completions do not depend on the student."""
        return self.teacher_writes in ("always", "reference")

    @property
    def hard_gate(self) -> Gate:
        """The gate without softness."""
        return replace(self.gate, alpha=math.inf)

    @property
    def weighting_gate(self) -> Gate | None:
        """The gate that weighs the loss; None where the weight follows from who wrote, or is constant."""
        if self.loss not in GATED_LOSSES or self.weighting in ("by_writer", "constant"):
            return None
        return self.gate if self.weighting == "soft" else self.hard_gate

    def with_tau(self, tau: float | Literal["auto"]) -> Method:
        return replace(self, gate=replace(self.gate, tau=tau))

    def teacher_gate(self, matched_rate: float = 0.0, iteration: int = 0) -> Gate:
        """Who writes in an iteration (from 0), as a gate. `matched_rate` is the share that the hard gate rewrites."""
        if self.gate_writes:
            return self.gate if self.teacher_writes == "soft" else self.hard_gate
        if self.teacher_writes in ("random", "mixture"):
            rate = self.teacher_rate * _linear_decay(iteration, self.teacher_rate_anneal)
            return random_gate(rate, per_completion=self.teacher_writes == "mixture")
        if self.teacher_writes == "matched":
            return random_gate(matched_rate)
        if self.reads_in_rollout:
            return replace(self.hard_gate, tau=sys.float_info.max)
        return NEVER if self.teacher_writes == "never" else ALWAYS

    def forward_kl_share(self, iteration: int) -> float:
        """What is left of the forward KL in an iteration (from 0), in [0, 1]."""
        return _linear_decay(iteration, self.forward_kl_anneal)

    def _check_temperatures(self) -> None:
        """A score function needs draws from the distribution that it differentiates; a tail bucket has no temperature;
        a loss of single tokens has no distribution to soften."""
        if self.temperature != 1 and (self.policy_gradient or self.importance_weights or self.loss == "negative"):
            raise ValueError(
                f"temperature: {self.temperature} with gamma {self.gamma}, estimator {self.estimator!r}, loss "
                f"{self.loss!r}; a policy gradient needs draws from the student itself; expected 1"
            )
        if self.loss_temperature != 1 and (
            self.truncates or self.estimator == "sampled" or self.loss in ("nll", "negative")
        ):
            raise ValueError(
                f"loss_temperature: {self.loss_temperature} with loss {self.loss!r}, estimator {self.estimator!r}, "
                f"top_k {self.top_k}, top_p {self.top_p}; it needs a divergence over both whole distributions; "
                "expected 1"
            )

    def _check_importance_weights(self) -> None:
        """Only under random is the distribution known that every token was drawn from, whoever wrote it."""
        if self.teacher_writes != "random" or self.teacher_rate_anneal or self.teacher_rate == 1:
            raise ValueError(
                f"importance_weights: with teacher_writes {self.teacher_writes!r}, teacher_rate {self.teacher_rate}, "
                f"teacher_rate_anneal {self.teacher_rate_anneal}; expected random, less than 1, 0"
            )
        if self.truncates or self.estimator == "sampled":
            raise ValueError(
                "importance_weights: with top_k, top_p or estimator sampled; they need the teacher's whole "
                "distribution and estimator exact"
            )

    def _check_sampled(self) -> None:
        """The score function sees one token a position: its writer must be whom the KL is an expectation over."""
        own_only = self.teacher_writes == "never" and self.loss == "reverse"
        teacher_only = self.teacher_writes == "always" and self.loss in ("forward", "nll")
        by_writer = self.loss == "weighted" and self.weighting == "by_writer" and not self.forward_kl_anneal
        if not (own_only or teacher_only or by_writer):
            raise ValueError(
                f"estimator: sampled with teacher_writes {self.teacher_writes!r} and loss {self.loss!r}; a reverse KL "
                "needs tokens of the student, a forward KL tokens of the teacher; expected exact"
            )


def _linear_decay(iteration: int, length: int) -> float:
    """From 1 to 0 over `length` iterations; always 1 if it is 0."""
    return max(1 - iteration / length, 0.0) if length else 1.0


GATED = Method()


def variant(base: Method, **fields: Any) -> Method:
    """`base` with other fields; those that it does not have itself are fields of its gate."""
    own = {name: fields.pop(name) for name in list(fields) if name in Method.__dataclass_fields__}
    return replace(base, gate=replace(own.pop("gate", base.gate), **fields), **own)


METHODS: dict[str, Method] = {
    # supervised fine-tuning on the teacher's completions; with teacher_writes=reference on reference completions
    "sft": variant(GATED, teacher_writes="always", loss="nll"),
    # classic distillation: Hinton et al. 2015 (1503.02531), on the teacher's completions as in Kim & Rush 2016
    # (1606.07947)
    "fkl": variant(GATED, teacher_writes="always", loss="forward"),
    # on-policy distillation by reverse KL: Gu et al. 2024, "MiniLLM" (2306.08543); Agarwal et al. 2024 (2306.13649)
    "rkl": variant(GATED, teacher_writes="never", loss="reverse"),
    # generalised knowledge distillation: Agarwal et al. 2024 (2306.13649), half of the completions
    # by the student
    "gkd": variant(GATED, teacher_writes="mixture", loss="jensen_shannon"),
    # sequence-level reverse KL: Gu et al. 2024, "MiniLLM" (2306.08543), each token from 0.2 teacher + 0.8 student, with
    # importance weights; without its language-modelling loss on a corpus and its clipping
    "minillm": variant(
        GATED,
        teacher_writes="random",
        teacher_rate=0.2,
        loss="reverse",
        gamma=1.0,
        length_normalize=True,
        importance_weights=True,
    ),
    # skew KLs: Ko et al. 2024, "DistiLLM" (2402.03898), on a mixture of completions, without its replay
    # buffer
    "skew_fkl": variant(GATED, teacher_writes="mixture", loss="skew_forward"),
    "skew_rkl": variant(GATED, teacher_writes="mixture", loss="skew_reverse"),
    # head and tail weighted by their gaps: Wu et al. 2024, "Rethinking KL divergence" (2404.02657)
    "akl": variant(GATED, teacher_writes="always", loss="akl"),
    # every token weighted by the log-ratio: Jung et al. 2025, "ToDi" (2505.16297)
    "todi": variant(GATED, teacher_writes="always", loss="todi"),
    # plus forward KL where the teacher's entropy is high: Jin et al. 2026, "Entropy-aware OPD" (2603.07079)
    "eopd": variant(
        GATED, score="teacher_entropy", tau=0.8, teacher_writes="never", loss="reverse_plus_forward", weighting="hard"
    ),
    # tokens outside the teacher's top K (tau) are replaced: Xu et al. 2025, "Speculative KD" (2410.11325), with K = 25
    # on a language model's vocabulary
    "skd": variant(GATED, score="rank", tau=4.0, loss="forward"),
    # one hand-over per completion, where the divergence is tau times its average so far: Peng et al. 2025, "AdaSwitch"
    # (2510.07842), which averages over a window
    "adaswitch": variant(GATED, score="forward_kl", relative=True, hand_over_rest=True, tau=3.0, loss="forward"),
    # the teacher writes with a probability that falls from 1 and labels every position: Ross et al. 2011, "DAgger"
    # (1011.0686), on the latest completions instead of all
    "dagger": variant(GATED, teacher_writes="random", teacher_rate=1.0, teacher_rate_anneal=100, loss="forward"),
    # ours: the teacher writes hard positions; reverse KL where the student wrote, forward KL where the teacher wrote
    "gated": GATED,
    "soft": variant(GATED, weighting="soft"),
    # the same at a given teacher cost; with a bound on each stretch between rewrites (KL(behaviour || teacher) <
    # tau (1 + E[rewrites]) if the teacher rewrites by `sample`); with gates on reasoning steps
    "budget": variant(GATED, budget=0.1),
    "cumulative": variant(GATED, cumulative=True),
    "step_mean": variant(GATED, step_reduction="mean"),
    "step_max": variant(GATED, step_reduction="max"),
    "step_sum": variant(GATED, step_reduction="sum"),
    # the same, but the forward KL fades: mode-covering first, mode-seeking later
    "cooled": variant(GATED, forward_kl_anneal=200),
    # its parts: the gate's KLs without rewriting, rewriting without the forward KL, and rewriting as many positions as
    # the gate would, chosen at random
    "gate_only": variant(GATED, teacher_writes="never", weighting="hard"),
    "rewrite_only": variant(GATED, loss="reverse"),
    "random_rewrite": variant(GATED, teacher_writes="matched"),
    # a control: no gate and no teacher tokens, the two KLs mixed at one weight everywhere
    "constant": variant(GATED, teacher_writes="never", weighting="constant"),
    # a control: the student's tokens at hard positions become less likely, whatever they are
    "negative": variant(GATED, teacher_writes="never", loss="negative", weighting="hard"),
}


def method(name: str) -> Method:
    """The row of that name."""
    if name not in METHODS:
        raise ValueError(f"agent: {name!r} is not a method; expected one of {', '.join(METHODS)}")
    return METHODS[name]


def for_new_pair(method: Method) -> Method:
    """The method for two models whose divergences nobody has seen: a gate on D_t chooses its tau.

    Thresholds of other scores, which come from publications, are kept.
    """
    gate = method.gate
    return method.with_tau("auto") if method.gated and gate.score == "divergence" and not gate.feeds_back else method


def truncated(method: Method, returned: int, teacher: str) -> Method:
    """The method with divergences over the likeliest ids that a served teacher returns, and a tail.

    Args:
        method: of the run.
        returned: ids that the teacher returns of a position; 0 for all.
        teacher: its name, for messages.

    Raises:
        ValueError: for a method that needs all of the teacher's distribution.
    """
    if not returned:
        return method
    top_k = method.top_k or returned
    if top_k > returned:
        raise ValueError(f"top_k: {top_k}; expected at most teacher_top_k, {returned}")
    try:
        return replace(method, top_k=top_k)
    except ValueError as error:
        raise ValueError(
            f"{error}; {teacher!r} returns only the {returned} most likely ids of a position; expected teacher_top_k "
            "0, which returns all"
        ) from None


def check_cacheable(method: Method) -> None:
    """Raise ValueError if the completions depend on the student, so that no other run can reuse them."""
    if not method.cacheable:
        rows = ", ".join(name for name, method in METHODS.items() if method.cacheable)
        raise ValueError(
            f"teacher_cache: with teacher_writes {method.teacher_writes!r} the completions depend on the student; "
            f"expected always or reference ({rows})"
        )
