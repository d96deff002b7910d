"""`curves.png` of a run."""

from pathlib import Path

from agents.atomic_io import write_file
from experiments.running.metric_display import metric
from experiments.running.run_folder import read_metrics

# metrics that share an axis
PANELS = (
    ("validation/correct_chains",),
    ("validation/accuracy",),
    ("rollout/divergence", "train/loss"),
    ("rollout/rewritten_share", "rollout/hard_share"),
    ("train/entropy",),
    ("train/grad_norm",),
)


def draw_curves(folder: Path, title: str) -> None:
    """Draw the metrics of a run over its iterations. A run without any of them has no picture."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    panels = [panel for panel in PANELS if any(panel[0] in row for row in rows)]
    if PANELS[0] in panels:  # correct chains say more than accuracy
        panels.remove(PANELS[1])
    if not panels:
        return
    width = 3.4 * len(panels)  # inches; the margins are fixed: a layout engine draws everything twice
    figure = Figure(figsize=(width, 2.9))
    axes = figure.subplots(1, len(panels), squeeze=False)
    figure.subplots_adjust(left=0.55 / width, right=1 - 0.1 / width, bottom=0.17, top=0.8, wspace=0.2)
    for axis, metrics in zip(axes[0], [[metric(key) for key in panel] for panel in panels], strict=True):
        for m in metrics:
            points = [(row["iteration"], row[m.key]) for row in rows if m.key in row]
            if points:
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
