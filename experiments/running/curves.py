"""`curves.png` of a run."""

from __future__ import annotations

from pathlib import Path

from agents.atomic_io import write_file
from experiments.running.run_folder import read_metrics

# metric, its label, and a second metric of the same unit
PANELS = (
    ("validation/correct_chains", "correct chains, student alone", ""),
    ("validation/accuracy", "accuracy, student alone", ""),
    ("rollout/divergence", "mean $D_t$, nats", "train/loss"),
    ("rollout/rewritten_share", "share of positions", "rollout/hard_share"),
    ("train/entropy", "entropy, nats", ""),
    ("train/grad_norm", "gradient norm", ""),
)


def draw_curves(folder: Path, title: str) -> None:
    """Draw the metrics of a run over its iterations. A run without any of them has no picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(folder)
    panels = [panel for panel in PANELS if any(panel[0] in row for row in rows)]
    panels = [p for p in panels if p[0] != "validation/accuracy" or p == panels[0]]  # correct chains say more
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.9), squeeze=False, layout="constrained")
    for axis, (key, label, second) in zip(axes[0], panels, strict=True):
        for name, style in ((key, "C0-"), (second, "C1-")):
            points = [(row["iteration"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, linewidth=1.3, label=name.split("/")[-1])
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("iteration", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if second:
            axis.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    write_file(folder / "curves.png", lambda path: figure.savefig(path, dpi=130, format="png"))
    plt.close(figure)
