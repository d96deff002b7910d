"""The methods: one table. A method is who writes each step, which loss is descended, and how two KLs are weighed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from distill_env.checks import check_types
from distill_env.gate import ALWAYS, NEVER, Gate, OverStep, random_gate

Writer = Literal["never", "always", "hard", "soft", "random", "mixture", "matched", "data"]
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
Weighting = Literal["written", "hard", "soft"]
Score = Literal["divergence", "forward_kl", "teacher_entropy", "rank"]
Estimator = Literal["exact", "sampled"]

GATED_LOSSES = ("weighted", "reverse_plus_forward", "negative")  # those that read the weighting
TOKEN_BY_TOKEN = ("todi", "akl")  # losses that weigh each token of the vocabulary by itself


@dataclass(frozen=True)
class Method:
    """What is learned from which states. Every field can be set from the command line."""

    writer: Writer = "hard"
    """Who writes a step: never or always the teacher; the teacher where the gate says so (hard, soft); the teacher with
    probability `rate`, per step (random) or per answer (mixture), or at the share of steps that were hard in the last
    iteration (matched); or reference answers (data)."""
    loss: Loss = "weighted"
    """What is descended at each state: negative log-likelihood of the token that stands, a divergence, reverse and
    forward KL weighted by the gate (weighted), reverse KL and the gate's part of the forward KL on top
    (reverse_plus_forward), or the log-likelihood of own tokens at hard steps (negative)."""
    weighting: Weighting = "written"
    """Weight of the reverse KL in a loss that the gate weighs: 1 on own and 0 on rewritten steps (written), by the hard
    gate, or by lambda = sigmoid(alpha (tau - score)) (soft)."""
    forward_kl_anneal: int = 0
    """Iterations over which the forward KL's part of a weighted loss falls linearly to 0, to the reverse KL's gain:
    first cover what the teacher does, then drop what it does not; 0 keeps the parts."""
    score: Score = "divergence"
    """What the gate reads: D_t = KL(student || teacher), the forward KL, the teacher's entropy, or the rank of the
    drafted token under the teacher."""
    tau: float = 0.5
    """Threshold of the gate, in the unit of the score: nats; ranks; or, if relative, multiples of the average."""
    budget: float = 0.0
    """Share of the steps to be hard, in [0, 1): tau follows it from iteration to iteration; 0 keeps tau."""
    alpha: float = 8.0
    """Sharpness of soft gates, per nat."""
    over_step: OverStep = "none"
    """Read the score as its causal mean, max or sum over the reasoning step so far."""
    smoothing: float = 0.0
    """Weight of the past in a moving average of the score, in [0, 1)."""
    score_clip: float = math.inf
    """Scores above this are read as this."""
    relative: bool = False
    """Read the score as a multiple of the average of the preceding ones in the answer."""
    cumulative: bool = False
    """Read the score as its sum since the last rewrite: tau is then a budget for each stretch between two."""
    lasting: bool = False
    """The first hard step hands the rest of the answer over to the teacher."""
    rate: float = 0.5
    """Probability of the random and the mixture writer."""
    anneal_iterations: int = 0
    """Iterations over which that probability falls linearly to 0; 0 keeps it."""
    beta: float = 0.5
    """Weight of the teacher in the mixture of the Jensen-Shannon divergence, in (0, 1)."""
    skew: float = 0.1
    """Weight that a skew KL mixes in, in (0, 1)."""
    loss_clip: float = math.inf
    """A step's loss above this is scaled down to it, in nats."""
    top_k: int = 0
    """Truncate divergences to the teacher's k likeliest tokens and a tail bucket; 0 takes all."""
    top_p: float = 1.0
    """Truncate divergences to the fewest tokens with this mass and a tail bucket; 1 takes all."""
    estimator: Estimator = "exact"
    """Gradient of the step at hand: in closed form over the vocabulary, or by the score function from what the
    environment pays."""
    gamma: float = 0.0
    """Discount of what follows, in [0, 1]; 0 is the per-step objective, 1 the sequence's."""
    length_normalize: bool = False
    """Divide what follows by the number of steps that follow, so that long answers weigh no more."""
    importance: bool = False
    """Take every token as drawn from the random writer's mixture and weigh it by q / mixture, the teacher's tokens too:
    they then carry a policy gradient, which they do not otherwise."""

    def __post_init__(self) -> None:
        check_types(self)
        gate = self.gate(self.alpha)
        random_gate(self.rate)
        for name, value, low, high in (("beta", self.beta, 0, 1), ("skew", self.skew, 0, 1)):
            if not low < value < high:
                raise ValueError(f"{name}: {value} is not in ({low}, {high})")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma: {self.gamma} is not in [0, 1]")
        if not self.loss_clip > 0:
            raise ValueError(f"loss_clip: {self.loss_clip} is not positive")
        for name in ("anneal_iterations", "forward_kl_anneal"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")
        if self.forward_kl_anneal and self.loss != "weighted":
            raise ValueError(f"forward_kl_anneal: with loss {self.loss!r}; accepted: weighted")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k, top_p: {self.top_k}, {self.top_p}; accepted: at least 0, and in (0, 1]")
        if self.score == "rank" and self.truncates:
            raise ValueError("score: a rank cannot be read off a truncated distribution; drop top_k and top_p")
        if self.loss in TOKEN_BY_TOKEN and self.truncates:
            raise ValueError(f"loss: {self.loss!r} weighs every token of the vocabulary; drop top_k and top_p")
        if self.loss == "negative" and self.writer != "never":
            raise ValueError(f"writer: {self.writer!r} with loss negative, which is of own tokens; accepted: never")
        if self.weighting == "soft" and gate.feeds_back:
            raise ValueError("weighting: soft does not go with cumulative and lasting; accepted: written, hard")
        if self.budget and not (0 < self.budget < 1 and self.gated and 0 < self.tau < math.inf):
            raise ValueError(
                f"budget: {self.budget} with writer {self.writer!r} and tau {self.tau}; accepted: in (0, 1), with a "
                "hard or soft writer or weighting and a positive, finite tau to begin with"
            )
        if self.estimator == "sampled":
            self._check_sampled()
        if self.importance:
            self._check_importance()

    @property
    def truncates(self) -> bool:
        """Whether divergences are taken on a truncated support."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def gated(self) -> bool:
        """Whether anything depends on the gate on the score."""
        return self.writer in ("hard", "soft") or self.weighting_gate() is not None

    @property
    def keeps_teacher(self) -> bool:
        """Whether the update reads the teacher's distributions."""
        return self.loss != "nll" if self.writer == "data" else self.estimator == "exact"

    @property
    def cacheable(self) -> bool:
        """Whether what is written does not depend on the student."""
        return self.writer in ("always", "data")

    def _check_importance(self) -> None:
        """Only of the random writer is the distribution known that every token, whoever wrote it, was drawn from."""
        if self.writer != "random" or self.anneal_iterations or self.rate == 1:
            raise ValueError(
                f"importance: with writer {self.writer!r}, rate {self.rate}, anneal_iterations "
                f"{self.anneal_iterations}; accepted: random, under 1, 0"
            )
        if self.truncates or self.estimator == "sampled":
            raise ValueError(
                "importance: needs all of the teacher's distribution; drop top_k and top_p, and take estimator exact"
            )

    def _check_sampled(self) -> None:
        """The score function sees one token a step: its writer has to be the one that the KL's expectation is over."""
        own_only = self.writer == "never" and self.loss == "reverse"
        teacher_only = self.writer == "always" and self.loss in ("forward", "nll")
        each_its_own = self.loss == "weighted" and self.weighting == "written" and not self.forward_kl_anneal
        if not (own_only or teacher_only or each_its_own):
            raise ValueError(
                f"estimator: sampled does not go with writer {self.writer!r} and loss {self.loss!r}: a reverse KL "
                "needs tokens of the student, a forward KL tokens of the teacher; take estimator exact"
            )

    def gate(self, alpha: float | None = None) -> Gate:
        """The gate on the method's score; hard without an alpha."""
        return Gate(
            self.score,
            self.tau,
            alpha,
            self.over_step,
            self.smoothing,
            self.score_clip,
            self.relative,
            self.cumulative,
            self.lasting,
        )

    def teacher_gate(self, matched_rate: float = 0.0, iteration: int = 0) -> Gate:
        """Who writes in an iteration (from 0), as a gate. `matched_rate` is the share of hard steps in the last one."""
        if self.writer == "hard":
            return self.gate()
        if self.writer == "soft":
            return self.gate(self.alpha)
        if self.writer in ("random", "mixture"):
            left = max(1 - iteration / self.anneal_iterations, 0.0) if self.anneal_iterations else 1.0
            return random_gate(self.rate * left, per_answer=self.writer == "mixture")
        if self.writer == "matched":
            return random_gate(matched_rate)
        return NEVER if self.writer == "never" else ALWAYS

    def forward_kl_share(self, iteration: int) -> float:
        """What is left of the forward KL in an iteration (from 0), in [0, 1]."""
        return max(1 - iteration / self.forward_kl_anneal, 0.0) if self.forward_kl_anneal else 1.0

    def weighting_gate(self) -> Gate | None:
        """The gate whose reverse weight weighs the loss; None where the weight follows from who wrote."""
        if self.loss not in GATED_LOSSES or self.weighting == "written":
            return None
        return self.gate(self.alpha if self.weighting == "soft" else None)


GATED = Method()

METHODS: dict[str, Method] = {
    # supervised fine-tuning on the teacher's answers, or on reference answers with --writer data
    "sft": replace(GATED, writer="always", loss="nll"),
    # classic distillation: Hinton et al. 2015 (1503.02531), on the teacher's answers as in Kim & Rush 2016 (1606.07947)
    "fkl": replace(GATED, writer="always", loss="forward"),
    # on-policy distillation by reverse KL: Gu et al. 2024, "MiniLLM" (2306.08543); Agarwal et al. 2024 (2306.13649)
    "rkl": replace(GATED, writer="never", loss="reverse"),
    # generalised knowledge distillation: Agarwal et al. 2024 (2306.13649), the student's answers with probability 1/2
    "gkd": replace(GATED, writer="mixture", loss="jensen_shannon"),
    # sequence-level reverse KL: Gu et al. 2024, "MiniLLM" (2306.08543), each token from 0.2 teacher + 0.8 student, with
    # importance weights; without its language-modelling loss on a corpus and its clipping
    "minillm": replace(
        GATED, writer="random", rate=0.2, loss="reverse", gamma=1.0, length_normalize=True, importance=True
    ),
    # skew KLs: Ko et al. 2024, "DistiLLM" (2402.03898), on a mixture of answers but without its replay buffer
    "skew_fkl": replace(GATED, writer="mixture", loss="skew_forward"),
    "skew_rkl": replace(GATED, writer="mixture", loss="skew_reverse"),
    # head and tail weighed by their gaps: Wu et al. 2024, "Rethinking KL divergence" (2404.02657)
    "akl": replace(GATED, writer="always", loss="akl"),
    # every token weighed by the log-ratio: Jung et al. 2025, "ToDi" (2505.16297)
    "todi": replace(GATED, writer="always", loss="todi"),
    # forward KL on top where the teacher hesitates: Jin et al. 2026, "Entropy-aware OPD" (2603.07079)
    "eopd": replace(
        GATED, writer="never", loss="reverse_plus_forward", weighting="hard", score="teacher_entropy", tau=0.8
    ),
    # tokens outside the teacher's first K (tau) replaced: Xu et al. 2025, "Speculative KD" (2410.11325); K is 25 there,
    # of a language model's vocabulary
    "skd": replace(GATED, score="rank", tau=4.0, loss="forward"),
    # one hand-over an answer, where the divergence is tau times its average so far: Peng et al. 2025, "AdaSwitch"
    # (2510.07842); there the average is over a window
    "adaswitch": replace(GATED, score="forward_kl", relative=True, lasting=True, tau=3.0, loss="forward"),
    # the teacher with a probability that falls from 1, its labels everywhere: Ross et al. 2011, "DAgger" (1011.0686),
    # on the latest answers instead of all
    "dagger": replace(GATED, writer="random", rate=1.0, anneal_iterations=100, loss="forward"),
    # ours: the teacher writes hard steps; reverse KL where the student wrote, forward KL where the teacher did
    "gated": GATED,
    "soft": replace(GATED, weighting="soft"),
    # the same at a given teacher cost; with a bound on each stretch between rewrites; with gates on reasoning steps
    "budget": replace(GATED, budget=0.1),
    "cumulative": replace(GATED, cumulative=True),
    "step_mean": replace(GATED, over_step="mean"),
    "step_max": replace(GATED, over_step="max"),
    "step_sum": replace(GATED, over_step="sum"),
    # the same, but the forward KL fades: cover first, seek later
    "cooled": replace(GATED, forward_kl_anneal=200),
    # and its parts: the KLs of the gate without the rewriting, the rewriting without the forward KL, and the rewriting
    # of as many steps as are hard, but of random ones
    "gate_only": replace(GATED, writer="never", weighting="hard"),
    "rewrite_only": replace(GATED, loss="reverse"),
    "random_rewrite": replace(GATED, writer="matched"),
    # a control: own tokens at hard steps are pushed down, whatever they are
    "negative": replace(GATED, writer="never", loss="negative", weighting="hard"),
}


def method(name: str) -> Method:
    """The row of that name."""
    if name not in METHODS:
        raise ValueError(f"agent: {name!r} is not a method; accepted: {', '.join(METHODS)}")
    return METHODS[name]


def check_cacheable(method: Method) -> None:
    """Raise ValueError if what the method writes depends on the student, so that no other run can reuse it."""
    if not method.cacheable:
        rows = ", ".join(name for name, row in METHODS.items() if row.cacheable)
        raise ValueError(
            f"teacher_cache: with writer {method.writer!r} the answers depend on the student; accepted: always, data "
            f"({rows})"
        )
