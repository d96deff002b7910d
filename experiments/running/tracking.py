"""A run's folder: metrics as CSV and for TensorBoard, W&B or trackio, a picture of the curves."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from agents.atomic_io import write_text
from agents.base import Metrics

Track = Literal["tensorboard", "wandb", "trackio", "none"]
PROJECT = "distill_env"  # of W&B and trackio


class Tracker:
    """Writes `metrics.csv` into a run's folder, and tells the metrics to TensorBoard, W&B or trackio.

    Args:
        folder: the run's.
        resume_at: iterations already done; what was logged after them is dropped.
        track: whom to tell.
        config: the run's configuration, told to W&B and trackio.
    """

    def __init__(
        self, folder: Path, resume_at: int = 0, track: Track = "none", config: dict[str, Any] | None = None
    ) -> None:
        self.path = folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = [row for row in read_metrics(folder) if row["iteration"] <= resume_at]
        self._columns = list(dict.fromkeys(key for row in self.rows for key in row))
        self._rewrite()
        self._listener: Any = None
        if track == "tensorboard":
            self._listener = TensorBoard(folder, resume_at)
        elif track != "none":
            self._listener = Service(track, folder, resume_at, config or {})

    def log(self, iteration: int, metrics: Metrics) -> None:
        row = {"iteration": iteration, **{key: float(value) for key, value in metrics.items()}}
        self.rows.append(row)
        if not set(row) <= set(self._columns):
            self._columns += [key for key in row if key not in self._columns]
            self._rewrite()
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        if self._listener is not None:
            self._listener.log(iteration, metrics)

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_at + 1)

    def log(self, iteration: int, metrics: Metrics) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        self._writer.close()


class Service:
    """W&B or trackio, whose interfaces are one. A resumed run goes on under its name; their own environment variables
    (WANDB_MODE, WANDB_PROJECT, TRACKIO_DIR ...) hold.

    Raises:
        ValueError: if it cannot be reached or wants a login.
    """

    def __init__(self, track: str, folder: Path, resume_at: int, config: dict[str, Any]) -> None:
        self._module: Any = importlib.import_module(track)
        options: dict[str, Any] = {"resume": "allow" if resume_at else "never"}
        if track == "wandb":
            path = folder / "wandb_id"  # a name is not unique there
            if not (resume_at and path.exists()):
                write_text(path, secrets.token_hex(4))
            options |= {"id": path.read_text(), "dir": str(folder)}
        project = os.environ.get("WANDB_PROJECT", PROJECT) if track == "wandb" else PROJECT
        try:
            self._module.init(project=project, name=folder.name, config=config, **options)
        except Exception as error:  # each has a family of errors of its own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"track: {track} did not start ({reason}); log in, set WANDB_MODE=offline, or take another --track"
            ) from None

    def log(self, iteration: int, metrics: Metrics) -> None:
        self._module.log(dict(metrics), step=iteration)

    def close(self) -> None:
        self._module.finish()


def check_track(track: Track) -> None:
    """Whether whom the metrics should go to is there.

    Raises:
        ValueError: if the package is not installed.
    """
    if track in ("wandb", "trackio") and importlib.util.find_spec(track) is None:
        raise ValueError(
            f"track: {track!r} is not installed (pip install 'distill-env[{track}]'); accepted: tensorboard, none, "
            "and what is installed"
        )


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of `metrics.csv`; empty cells are left out, and so is a last line that a kill cut short.

    Raises:
        ValueError: in one line, if it holds something else.
    """
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            text = file.read()
        lines = text[: text.rfind("\n") + 1].splitlines()
        rows = list(csv.DictReader(lines, strict=True))
        return [
            {"iteration": int(row["iteration"])} | {k: float(v) for k, v in row.items() if v and k != "iteration"}
            for row in rows
        ]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise damaged(path, error) from None


def draw_curves(folder: Path, title: str) -> None:
    """`curves.png`: what was learned, how much the teacher wrote, and how steadily."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(folder)
    panels = [
        ("validation/correct_chains", "correct chains, student alone", None),
        ("validation/accuracy", "accuracy, student alone", None),
        ("rollout/divergence", "mean $D_t$, nats", "train/loss"),
        ("rollout/rewritten_share", "share of steps", "rollout/hard_share"),
        ("train/entropy", "entropy, nats", None),
        ("train/grad_norm", "gradient norm", None),
    ]
    panels = [p for p in panels if any(p[0] in row for row in rows)]
    panels = [p for p in panels if p[0] != "validation/accuracy" or p == panels[0]]  # chains say more
    if not panels:
        return  # an agent that reports nothing of this
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.9), squeeze=False, layout="constrained")
    for axis, (key, label, second) in zip(axes[0], panels, strict=True):
        for name, style in ((key, "C0-"), (second, "C1-")):
            points = [(row["iteration"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, linewidth=1.3, label=str(name).split("/")[-1])
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("iteration", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if second is not None:
            axis.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    aside = folder / "curves.png.new"
    figure.savefig(aside, dpi=130, format="png")
    aside.replace(folder / "curves.png")
    plt.close(figure)


def progress_bar(console: Console) -> Progress:
    """The bar of everything that takes long."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def write_json(path: Path, value: Any) -> None:
    """A reader finds the old file or the new one."""
    write_text(path, json.dumps(value, indent=1))


def read_json(path: Path, needed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `write_json` wrote, an object with values of the `needed` types under these keys.

    Raises:
        ValueError: in one line, if the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise TypeError(f"{type(value).__name__}, not an object")
        for key, kind in (needed or {}).items():
            if not isinstance(value.get(key), kind):
                raise TypeError(f"{key} is {type(value.get(key)).__name__}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise damaged(path, error) from None
    return value


def damaged(path: Path, error: Exception) -> ValueError:
    """The error for a file of a run that cannot be read."""
    reason = f"{type(error).__name__}: {error}".split("\n")[0]
    return ValueError(f"run: {str(path)!r} is damaged ({reason}); restore it, or start again under another --name")


def finite(value: Any) -> Any:
    """The same with null for numbers that are not finite, as strict JSON wants it."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


Rows = tuple[tuple[str, str, str], ...]  # key, label, format

TABLE: dict[str, Rows] = {
    "right": (
        ("accuracy", "accuracy (final value)", "{:.1%}"),
        ("undecided", "grading gave up", "{:.1%}"),
        ("correct_chains", "correct chains", "{:.1%}"),
        ("pass@{k}", "pass@{k}", "{:.1%}"),
        ("majority@{k}", "majority@{k}", "{:.1%}"),
    ),
    "in the teacher's eyes": (
        ("perplexity", "perplexity of the teacher's answers", "{:.3f}"),
        ("reference_perplexity", "perplexity of the reference answers", "{:.3f}"),
        ("teacher_log_prob", "teacher's log-probability, nats a token", "{:.3f}"),
        ("divergence", "D_t on own answers, nats", "{:.3f}"),
        ("exposure_gap", "  less that on the teacher's, nats", "{:.3f}"),
        ("hard_share", "hard steps (D_t >= tau)", "{:.1%}"),
        ("hard_share_quarter/1", "  in the first quarter of an answer", "{:.1%}"),
        ("hard_share_quarter/4", "  in the last quarter", "{:.1%}"),
    ),
    "diverse": (
        ("entropy", "entropy, nats a token", "{:.3f}"),
        ("distinct_ways", "distinct right ways a prompt, in {k} answers", "{:.2f}"),
        ("distinct_answers", "distinct answers among {k}", "{:.1%}"),
        ("collapse", "collapse (all {k} answers the same)", "{:.1%}"),
        ("self_bleu", "self-BLEU of {k} answers", "{:.3f}"),
        ("distinct_2", "distinct 2-grams", "{:.1%}"),
    ),
    "in form": (
        ("length", "tokens an answer", "{:.1f}"),
        ("steps", "steps an answer", "{:.1f}"),
        ("ended", "ended by the end token", "{:.1%}"),
        ("repetition", "repeated 4-grams", "{:.1%}"),
    ),
    "out of distribution": (
        ("ood/accuracy", "out of distribution: accuracy", "{:.1%}"),
        ("ood/correct_chains", "out of distribution: correct chains", "{:.1%}"),
        ("ood/pass@{k}", "out of distribution: pass@{k}", "{:.1%}"),
    ),
}
"""What is shown of an evaluation, by what it is about; "ood/" keys come from the out-of-distribution split."""

TABLE_ROWS: Rows = tuple(row for rows in TABLE.values() for row in rows)

Line = tuple[str, list[str]]


def table_rows(samples: int, columns: Sequence[dict[str, float | None]], rows: Rows = TABLE_ROWS) -> list[Line]:
    """The lines of the before/after table: a label and one formatted cell a column; n/a where there is no number."""
    lines = []
    for key, label, form in rows:
        name = key.format(k=samples)
        if any(name in column for column in columns):
            cells = [cell(form, column.get(name)) for column in columns]
            lines.append((label.format(k=samples), cells))
        if key == "accuracy":
            for name in sorted({k for column in columns for k in column if k.startswith("accuracy/")}, key=_number):
                cells = [cell(form, column.get(name)) for column in columns]
                lines.append((f"  of difficulty {name.partition('/')[2]}", cells))
    return lines


def add_metrics(table: Table, samples: int, columns: Sequence[dict[str, float | None]]) -> None:
    """Fill a table with these lines, a rule between what is about different things."""
    for rows in TABLE.values():
        for label, cells in table_rows(samples, columns, rows):
            table.add_row(label, *cells)
        table.add_section()


def _number(name: str) -> int:
    return int(name.partition("/")[2])


def cell(form: str, value: float | None) -> str:
    """A number, or n/a."""
    return "n/a" if value is None or not math.isfinite(value) else form.format(value)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the head first; all columns but the first are numbers."""
    align = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], align, *lines[1:]))
