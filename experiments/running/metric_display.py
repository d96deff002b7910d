"""How metrics are shown: label, format, and which direction is better. Every table and figure reads it from here."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A metric under its key in `evaluation.json` or `metrics.csv`. The label includes the unit."""

    key: str
    label: str
    form: str = "{:.3f}"
    better: Literal["more", "less", ""] = ""
    signed: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """Which values are possible."""
        return (-math.inf if self.signed else 0.0), (1.0 if self.scale == 100 else math.inf)

    @property
    def scale(self) -> float:
        """By which a value is multiplied where the title has the unit: 100 for shares."""
        return 100.0 if self.form.endswith("%}") else 1.0

    @property
    def title(self) -> str:
        """The label for an axis or a column of plain numbers."""
        return f"{self.label}, %" if self.scale == 100 else self.label

    def text(self, value: float | None) -> str:
        """The value; n/a if it is missing or not finite."""
        return cell(self.form, value)

    def number_form(self, sign: bool = False) -> str:
        """The format of a number in the unit of the title; with `sign` for a difference."""
        form = self.form.replace("%}", "f}")
        return form.replace("{:", "{:+") if sign else form


EVALUATION: dict[str, tuple[Metric, ...]] = {
    "correctness": (
        Metric("accuracy", "accuracy of the final value", "{:.1%}", "more"),
        Metric("undecided", "completions that could not be graded", "{:.1%}", "less"),
        Metric("correct_chains", "correct chains", "{:.1%}", "more"),
        Metric("pass@{k}", "pass@{k}", "{:.1%}", "more"),
        Metric("majority@{k}", "majority@{k}", "{:.1%}", "more"),
    ),
    "distance to the teacher": (
        Metric("perplexity", "perplexity of the teacher's completions", "{:.4g}", better="less"),
        Metric("reference_perplexity", "perplexity of the reference completions", "{:.4g}", better="less"),
        Metric("forward_kl", "forward KL on the teacher's completions, nats per token", better="less"),
        Metric("teacher_log_prob", "teacher's log-probability, nats per token", better="more", signed=True),
        Metric("divergence", "mean D_t, nats", better="less"),
        Metric("exposure_gap", "mean D_t minus that on the teacher's completions, nats", better="less", signed=True),
        Metric("high_divergence_share", "positions with D_t >= 0.5 nats", "{:.1%}", "less"),
        Metric("hard_share", "positions that the run's gate finds hard", "{:.1%}"),
        Metric("hard_share_quarter/1", "hard positions in the first quarter of a completion", "{:.1%}"),
        Metric("hard_share_quarter/4", "hard positions in the last quarter of a completion", "{:.1%}"),
    ),
    "diversity": (
        Metric("entropy", "entropy, nats per token"),
        Metric("distinct_ways", "distinct correct ways per prompt", "{:.2f}", "more"),
        Metric("distinct_answers", "distinct completions", "{:.1%}"),
        Metric("collapse", "prompts with identical completions", "{:.1%}", "less"),
        Metric("self_bleu", "self-BLEU"),
        Metric("distinct_2", "distinct 2-grams", "{:.1%}"),
    ),
    "form": (
        Metric("length", "tokens per completion", "{:.1f}"),
        Metric("steps", "reasoning steps per completion", "{:.1f}"),
        Metric("ended", "completions that end with the end token", "{:.1%}"),
        Metric("repetition", "repeated 4-grams", "{:.1%}", "less"),
    ),
    "out of distribution": (
        Metric("ood/accuracy", "accuracy of the final value, out of distribution", "{:.1%}", "more"),
        Metric("ood/correct_chains", "correct chains, out of distribution", "{:.1%}", "more"),
        Metric("ood/pass@{k}", "pass@{k}, out of distribution", "{:.1%}", "more"),
        Metric("retention", "share of correct chains kept out of distribution", "{:.1%}", "more"),
    ),
}
"""Metrics of an evaluation, by topic. Keys with "ood/" come from the out-of-distribution split."""

ON_CALL: tuple[Metric, ...] = (
    Metric("on_call/accuracy", "accuracy of the final value", "{:.1%}", "more"),
    Metric("on_call/correct_chains", "correct chains", "{:.1%}", "more"),
    Metric("on_call/teacher_share", "tokens written by the teacher", "{:.1%}", "less"),
)
"""Metrics of an agent that may ask its teacher while it writes."""

TRAINING: tuple[Metric, ...] = (
    Metric("tokens", "training tokens", "{:,.0f}"),
    Metric("student_tokens", "training tokens written by the student", "{:,.0f}"),
    Metric("teacher_tokens", "training tokens written by the teacher", "{:,.0f}", "less"),
    Metric("reference_tokens", "training tokens from the data's reference completions", "{:,.0f}"),
    Metric("teacher_share", "training tokens written by the teacher", "{:.1%}", "less"),
    Metric("teacher_tokens_per_student_token", "teacher tokens per student token", better="less"),
    Metric("teacher_positions", "positions scored by the teacher", "{:,.0f}", "less"),
    Metric("teacher_passes", "teacher passes", "{:,.0f}", "less"),
    Metric("rewritten_share_first", "rewritten positions, first tenth of training", "{:.1%}"),
    Metric("rewritten_share_last", "rewritten positions, last tenth of training", "{:.1%}"),
    Metric("hard_share_first", "hard positions, first tenth of training", "{:.1%}"),
    Metric("hard_share_last", "hard positions, last tenth of training", "{:.1%}"),
    Metric("loss_oscillation", "loss oscillation, nats", better="less"),
    Metric("grad_norm", "gradient norm", "{:.2f}", "less"),
    Metric("seconds", "training time, seconds", "{:,.0f}"),
)
"""Metrics of a run's training, from `evaluation.json`."""

DIAGNOSIS: tuple[Metric, ...] = (
    Metric("chains@1", "correct chains", "{:.1%}"),
    Metric("chains@0.5", "correct chains at temperature 0.5", "{:.1%}"),
    Metric("chains@0.05", "correct chains at temperature 0.05", "{:.1%}"),
    Metric("wrong_forced", "wrong mass in states without a choice", "{:.2%}"),
    Metric("wrong_choice", "wrong mass in states with a choice", "{:.2%}"),
    Metric("missing_choice", "missed teacher mass in states with a choice", "{:.1%}"),
    Metric("first_wrong/0", "completions whose first wrong token starts a reasoning step", "{:.1%}"),
    Metric("first_wrong/1", "... is the result of a step", "{:.1%}"),
    Metric("first_wrong/2", "... is a separator or the end token", "{:.1%}"),
)
"""Metrics of `diagnose.py`."""

ROLLOUT_COST: tuple[Metric, ...] = (
    Metric("drafted", "tokens drafted", "{:,.0f}"),
    Metric("committed", "committed", "{:,.0f}"),
    Metric("wasted", "wasted", "{:,.0f}", "less"),
    Metric("student_seconds", "seconds of the student", "{:,.1f}", "less"),
    Metric("teacher_seconds", "of the teacher", "{:,.1f}", "less"),
    Metric("update_seconds", "of the update", "{:,.1f}", "less"),
    Metric("other_seconds", "of the rest", "{:,.1f}", "less"),
    Metric("tokens_per_second", "tokens per second", "{:,.0f}", "more"),
)
"""What the rollouts of a training cost, from `evaluation.json`."""

ITERATION: tuple[Metric, ...] = (
    Metric("train/loss", "loss", "{:.4f}"),
    Metric("train/entropy", "entropy, nats"),
    Metric("train/grad_norm", "gradient norm", "{:.2f}"),
    Metric("train/hand_over_loss", "squared error of the hand-over head's log(D_t + 0.01)", better="less"),
    Metric("train/hand_over_auroc", "AUROC of the hand-over head for hard positions", better="more"),
    Metric("train/learning_rate", "learning rate", "{:.2g}"),
    Metric("rollout/divergence", "D_t"),
    Metric("rollout/truncated_divergence", "truncated D_t"),
    Metric("rollout/truncated_hard_share", "hard by truncated D_t", "{:.1%}"),
    Metric("rollout/hard_share", "hard", "{:.1%}"),
    Metric("rollout/rewritten_share", "rewritten", "{:.1%}"),
    Metric("rollout/reward", "reward per completion"),
    Metric("rollout/length", "tokens per completion", "{:.1f}"),
    Metric("rollout/rewrite_easy", "P(REWRITE), easy", "{:.1%}"),
    Metric("rollout/rewrite_hard", "hard", "{:.1%}"),
    Metric("rollout/rewrite_correlation", "P(REWRITE) and D_t, correlation", "{:.2f}", signed=True),
    Metric("validation/accuracy", "accuracy", "{:.1%}", "more"),
    Metric("validation/forward_kl", "held-out forward KL, nats", better="less"),
    Metric("validation/divergence", "held-out D_t, nats", better="less"),
    Metric("validation/correct_chains", "correct chains", "{:.1%}", "more"),
    Metric("time/tokens_per_second", "tokens/s", "{:,.0f}", "more"),
)
"""Metrics of an iteration, from `metrics.csv`."""

METRICS = {m.key: m for group in (*EVALUATION.values(), ON_CALL, TRAINING, ROLLOUT_COST, ITERATION) for m in group}


def metric(key: str) -> Metric:
    """The display of a key, also of one at some k, difficulty, or out of distribution: `pass@8`, `ood/entropy/5`."""
    if key in METRICS:
        return METRICS[key]
    if match := re.fullmatch(r"(.+@)(\d+)", key):
        base = METRICS.get(f"{match[1]}{{k}}", Metric(key, key))
        return replace(base, key=key, label=base.label.format(k=match[2]))
    name, _, last = key.rpartition("/")
    if name and last.isdigit():
        base = metric(name)
        return replace(base, key=key, label=f"{base.label}, difficulty {last}")
    if name.startswith("teacher_"):
        base = metric(name)
        return replace(base, key=key, label=f"{base.label}, teacher {last}")
    if key.startswith("ood/"):
        base = metric(key.removeprefix("ood/"))
        return replace(base, key=key, label=f"{base.label}, out of distribution")
    return Metric(key, key)


def evaluation_lines(samples: int, columns: Sequence[Mapping[str, float | None]]) -> dict[str, list[list[str]]]:
    """Lines of a table of evaluations by topic: a label, and the value in each column.

    Args:
        samples: completions per prompt.
        columns: the evaluations. A metric that none of them has is left out.
    """
    topics: dict[str, list[list[str]]] = {}
    for topic, metrics in EVALUATION.items():
        keys = [m.key.format(k=samples) for m in metrics]
        difficulties = {key for column in columns for key in column if re.fullmatch(r"accuracy/\d+", key)}
        keys[1:1] = sorted(difficulties, key=lambda key: int(key[9:])) if "accuracy" in keys else []
        shown = [metric(key) for key in keys if any(key in column for column in columns)]
        topics[topic] = [[m.label, *(m.text(column.get(m.key)) for column in columns)] for m in shown]
    return {topic: lines for topic, lines in topics.items() if lines}


def cell(form: str, value: float | None) -> str:
    """A formatted number, or n/a."""
    return "n/a" if value is None or not math.isfinite(value) else form.format(value)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the head first; all columns but the first are numbers."""
    align = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], align, *lines[1:]))
