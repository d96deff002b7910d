"""The metrics of a training: `metrics.csv`, and TensorBoard, W&B or trackio."""

import csv
import importlib
import importlib.util
import io
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.atomic_io import write_text
from agents.base import Metrics
from experiments.running.config import Track
from experiments.running.run_folder import read_metrics

PROJECT = "distill_env"  # of W&B and trackio


class Tracker:
    """Writes metrics to `metrics.csv` in a run's folder, and to TensorBoard, W&B or trackio.

    Args:
        folder: of the run.
        resume_at: iterations already done; what was logged after them is dropped.
        track: the service that also receives the metrics.
        config: of the run, for W&B and trackio.
    """

    def __init__(
        self, folder: Path, resume_at: int = 0, track: Track = "none", config: dict[str, Any] | None = None
    ) -> None:
        self.path = folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = [row for row in read_metrics(folder) if row["iteration"] <= resume_at]
        self._columns = list(dict.fromkeys(key for row in self.rows for key in row))
        self._rewrite()
        self._service: Any = None
        if track == "tensorboard":
            self._service = TensorBoard(folder, resume_at)
        elif track != "none":
            self._service = Service(track, folder, resume_at, config or {})

    def log(self, iteration: int, metrics: Metrics) -> None:
        row = {"iteration": iteration, **{key: float(value) for key, value in metrics.items()}}
        self.rows.append(row)
        if not set(row) <= set(self._columns):
            self._columns += [key for key in row if key not in self._columns]
            self._rewrite()
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        if self._service is not None:
            self._service.log(iteration, metrics)

    def log_text(self, iteration: int, name: str, texts: Sequence[str]) -> None:
        """Send texts, for those to read who watch the training. Only TensorBoard takes them."""
        if isinstance(self._service, TensorBoard):
            self._service.log_text(iteration, name, texts)

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())

    def close(self) -> None:
        if self._service is not None:
            self._service.close()


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_at + 1)

    def log(self, iteration: int, metrics: Metrics) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, iteration)

    def log_text(self, iteration: int, name: str, texts: Sequence[str]) -> None:
        """The texts as paragraphs of code, as TensorBoard reads Markdown."""
        blocks = ("\n".join(f"    {line}" for line in text.splitlines()) for text in texts)
        self._writer.add_text(name, "\n\n---\n\n".join(blocks), iteration)

    def close(self) -> None:
        self._writer.close()


class Service:
    """W&B or trackio, which have the same interface. A resumed run continues under its name. Their own environment
    variables (WANDB_MODE, WANDB_PROJECT, TRACKIO_DIR, ...) apply.

    Raises:
        ValueError: if the service cannot be reached or requires a login.
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
            remedy = "log in, set WANDB_MODE=offline, or take another --track"
            raise ValueError(f"track: {track} did not start ({reason}); {remedy}") from None

    def log(self, iteration: int, metrics: Metrics) -> None:
        self._module.log(dict(metrics), step=iteration)

    def close(self) -> None:
        self._module.finish()


def check_track(track: Track) -> None:
    """Raise ValueError if the package of a tracker is not installed."""
    if track in ("wandb", "trackio") and importlib.util.find_spec(track) is None:
        remedy = f"pip install 'distill-env[{track}]', or take tensorboard or none"
        raise ValueError(f"track: {track!r} is not installed; {remedy}")
