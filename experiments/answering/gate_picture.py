"""A picture of the gate at work: the score of each position against tau, above the token and its writer."""

from __future__ import annotations

import math
from pathlib import Path

from distill_env.tasks.base import Task
from experiments.answering.assisted import AssistedCompletions, Parts
from experiments.reporting.viewer import token_text

STUDENT, TEACHER, INK = "#9aa5b1", "#d9480f", "#22262d"
MAX_TOKENS = 40  # of a long completion only the first ones are drawn


def clearest(completions: AssistedCompletions) -> Parts:
    """The completion with the most visible bars of both writers; of several, the one with the lowest peak."""

    def clarity(part: Parts) -> tuple[int, float]:
        own = [score for score, by_teacher in zip(part.scores, part.rewritten, strict=True) if not by_teacher]
        visible = sum(score > completions.tau / 10 for score in own)
        return min(visible, sum(part.rewritten)), -max(part.scores)

    return max(completions, key=clarity)


def draw_gate(task: Task, completions: AssistedCompletions, path: Path) -> None:
    """Write the picture of one completion.

    Raises:
        ValueError: if the gate compared no scores with tau.
    """
    if not 0 < completions.tau < math.inf:
        raise ValueError(f"tau: {completions.tau:g} with picture; expected a positive, finite number")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    part, tau = clearest(completions), completions.tau
    scores, rewritten = part.scores[:MAX_TOKENS], part.rewritten[:MAX_TOKENS]
    texts = [token_text(task, token) for token in part.tokens[:MAX_TOKENS]]
    colours = [TEACHER if by_teacher else STUDENT for by_teacher in rewritten]
    figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
    axes.bar(range(len(scores)), scores, 0.62, color=colours, zorder=2)
    axes.axhline(tau, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=3)
    axes.annotate(f"$\\tau$ = {tau:g} nats", (1, tau), (0, 4), ("axes fraction", "data"), "offset points", ha="right")
    axes.set_xticks(range(len(texts)), texts, fontsize=15, family="monospace")
    for label, by_teacher in zip(axes.get_xticklabels(), rewritten, strict=True):
        if by_teacher:
            label.set(color=TEACHER, fontweight="bold")
            label.set_bbox({"boxstyle": "round,pad=0.22", "facecolor": "#fff1ea", "edgecolor": TEACHER})
    axes.set_xlabel(
        "The student writes; where $D_t$ reaches $\\tau$, the teacher writes the token instead.", labelpad=10
    )
    axes.set_ylabel("$D_t$ = KL(student || teacher), nats")
    axes.set_title(f"prompt  {part.prompt.text}", loc="left", family="monospace", fontsize=13)
    axes.legend(
        [Patch(color=STUDENT), Patch(color=TEACHER)],
        ["written by the student", "written by the teacher"],
        frameon=False,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.2,
        ncols=2,
    )
    axes.margins(x=0.02, y=0.08)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", pad=9)
    axes.grid(axis="y", alpha=0.25, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
