"""The methods: one table. A method is who writes each step, which loss is descended, and how two KLs are weighed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from distill_env.gate import ALWAYS, NEVER, Gate, OverStep, random_gate

Writer = Literal["never", "always", "hard", "soft", "random", "mixture", "matched", "data"]
Loss = Literal["nll", "forward", "reverse", "jensen_shannon", "skew_forward", "skew_reverse", "weighted"]
Weighting = Literal["written", "hard", "soft"]
Score = Literal["divergence", "forward_kl", "teacher_entropy", "rank"]
Estimator = Literal["exact", "sampled"]


@dataclass(frozen=True)
class Method:
    """What is learned from which states. Every field can be set from the command line."""

    writer: Writer = "hard"
    """Who writes a step: never or always the teacher; the teacher where the gate says so (hard, soft); the teacher with
    probability `rate`, per step (random) or per answer (mixture), or at the share of steps that were hard in the last
    iteration (matched); or reference answers (data)."""
    loss: Loss = "weighted"
    """What is descended at each state: negative log-likelihood of the token that stands, a divergence, or reverse and
    forward KL weighted by the gate."""
    weighting: Weighting = "written"
    """Weight of the reverse KL in a weighted loss: 1 on own and 0 on rewritten steps (written), by the hard gate, or by
    lambda = sigmoid(alpha (tau - score)) (soft)."""
    score: Score = "divergence"
    """What the gate reads: D_t = KL(student || teacher), the forward KL, the teacher's entropy, or the rank of the
    drafted token under the teacher."""
    tau: float = 0.5
    """Threshold of the gate, in the unit of the score (nats)."""
    alpha: float = 8.0
    """Sharpness of soft gates, per nat."""
    over_step: OverStep = "none"
    """Read the score as its causal mean, max or sum over the reasoning step so far."""
    smoothing: float = 0.0
    """Weight of the past in a moving average of the score, in [0, 1)."""
    score_clip: float = math.inf
    """Scores above this are read as this."""
    rate: float = 0.5
    """Probability of the random and the mixture writer."""
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

    def __post_init__(self) -> None:
        self.gate(self.alpha)
        random_gate(self.rate)
        for name, value, low, high in (("beta", self.beta, 0, 1), ("skew", self.skew, 0, 1)):
            if not low < value < high:
                raise ValueError(f"{name}: {value} is not in ({low}, {high})")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma: {self.gamma} is not in [0, 1]")
        if not self.loss_clip > 0:
            raise ValueError(f"loss_clip: {self.loss_clip} is not positive")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k, top_p: {self.top_k}, {self.top_p}; accepted: at least 0, and in (0, 1]")
        if self.score == "rank" and (self.top_k or self.top_p < 1):
            raise ValueError("score: a rank cannot be read off a truncated distribution; drop top_k and top_p")
        if self.estimator == "sampled":
            self._check_sampled()

    def _check_sampled(self) -> None:
        """The score function sees one token a step: its writer has to be the one that the KL's expectation is over."""
        own_only = self.writer == "never" and self.loss == "reverse"
        teacher_only = self.writer == "always" and self.loss in ("forward", "nll")
        each_its_own = self.loss == "weighted" and self.weighting == "written"
        if not (own_only or teacher_only or each_its_own):
            raise ValueError(
                f"estimator: sampled does not go with writer {self.writer!r} and loss {self.loss!r}: a reverse KL "
                "needs tokens of the student, a forward KL tokens of the teacher; take estimator exact"
            )

    def gate(self, alpha: float | None = None) -> Gate:
        """The gate on the method's score; hard without an alpha."""
        return Gate(self.score, self.tau, alpha, self.over_step, self.smoothing, self.score_clip)

    def writer_gate(self, matched_rate: float = 0.0) -> Gate:
        """Who writes, as a gate. `matched_rate` is the share of hard steps in the last iteration."""
        if self.writer == "hard":
            return self.gate()
        if self.writer == "soft":
            return self.gate(self.alpha)
        if self.writer in ("random", "mixture"):
            return random_gate(self.rate, per_answer=self.writer == "mixture")
        if self.writer == "matched":
            return random_gate(matched_rate)
        return NEVER if self.writer == "never" else ALWAYS

    def weighting_gate(self) -> Gate | None:
        """The gate whose reverse weight weighs the loss; None where the weight follows from who wrote."""
        if self.loss != "weighted" or self.weighting == "written":
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
    # ours: the teacher writes hard steps; reverse KL where the student wrote, forward KL where the teacher did
    "gated": GATED,
    "soft": replace(GATED, weighting="soft"),
    # and its parts: the KLs of the gate without the rewriting, the rewriting without the forward KL, and the rewriting
    # of as many steps as are hard, but of random ones
    "gate_only": replace(GATED, writer="never", weighting="hard"),
    "rewrite_only": replace(GATED, loss="reverse"),
    "random_rewrite": replace(GATED, writer="matched"),
}


def method(name: str) -> Method:
    """The row of that name."""
    if name not in METHODS:
        raise ValueError(f"agent: {name!r} is not a method; accepted: {', '.join(METHODS)}")
    return METHODS[name]
