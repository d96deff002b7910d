"""`curves.png` of a run."""

import math
from pathlib import Path

from agents.atomic_io import write_file
from experiments.running.metric_display import metric
from experiments.running.run_folder import read_metrics

# metrics that share an axis
PANELS = (
    ("validation/correct_chains",),
    ("validation/accuracy",),
    ("validation/forward_kl", "validation/divergence"),
    ("train/loss", "rollout/divergence", "rollout/truncated_divergence"),
    ("rollout/rewritten_share", "rollout/hard_share"),
    ("train/entropy",),
    ("train/grad_norm",),
)
# of agents that learn from rewards
REWARD_PANELS = (
    ("rollout/reward",),
    ("rollout/length",),
    ("rollout/rewrite_easy", "rollout/rewrite_hard"),
    ("rollout/rewrite_correlation",),
)


def draw_curves(folder: Path, title: str) -> None:
    """Draw the metrics of a run over its iterations. A run without any of them has no picture."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    wanted = PANELS if any("rollout/hard_share" in row for row in rows) else PANELS + REWARD_PANELS
    panels = [panel for panel in wanted if any(panel[0] in row for row in rows)]
    if PANELS[0] in panels:  # correct chains say more than accuracy
        panels.remove(PANELS[1])
    if not panels:
        return
    columns = min(len(panels), 5)
    lines = math.ceil(len(panels) / columns)
    width, height = 3.4 * columns, 2.9 * lines  # inches; the margins are fixed: a layout engine draws everything twice
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    figure.subplots_adjust(
        left=0.55 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.58 / height, wspace=0.2, hspace=0.45
    )
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes, panels, strict=False):
        metrics = [metric(key) for key in panel if any(key in row for row in rows)]
        for m in metrics:
            points = [(row["iteration"], row[m.key]) for row in rows if m.key in row]
            axis.plot(*zip(*points, strict=True), linewidth=1.3, label=m.label)
        axis.set_title(", ".join(m.label for m in metrics), fontsize=10)
        axis.set_xlabel("iteration", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.locator_params(nbins=5)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(metrics) > 1:
            axis.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    write_file(folder / "curves.png", lambda path: figure.savefig(path, dpi=130, format="png"))
