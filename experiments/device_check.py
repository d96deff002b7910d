"""Check a device against the CPU, and measure what an iteration costs there. Nothing is downloaded.

    python experiments/device_check.py
    python experiments/device_check.py --device cuda --shape qwen2.5-0.5b --out device.json

A failed check is an error.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

from experiments.running.cli import command


@dataclass(frozen=True)
class DeviceCheckConfig:
    """Check a device against the CPU, and measure an iteration there."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes cuda if there is one."""
    shape: Literal["tiny", "qwen2.5-0.5b", "qwen2.5-1.5b", "none"] = "tiny"
    """Sizes of the measured student and teacher, with random weights; the Qwen shapes have a 7B teacher."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights in the measurements; the checks are in float32."""
    out: Path | None = None
    """JSON file for the results."""


def check(config: DeviceCheckConfig) -> None:
    import torch

    from distill_env.models.pretrained import find_device
    from experiments.benchmarking.device import checks, measurements
    from experiments.running.run_folder import write_json

    device = find_device(config.device)
    name = str(device)
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = list(checks(device))
    if config.shape != "none":
        rows += measurements(device, config.shape, getattr(torch, config.dtype))
    table = Table(title=f"{name} ({label}), {config.shape}, {config.dtype}", title_justify="left")
    for column in ("", "value", "limit", ""):
        table.add_column(column)
    for row in rows:
        verdict = {True: "[green]PASS[/]", False: "[red]FAIL[/]", None: ""}[row.passed]
        limit = "" if row.limit is None else f"{row.limit:g}"
        table.add_row(row.name, f"{row.value:.4g} {row.unit}", limit, verdict)
    Console().print(table)
    if config.out:
        found = [{"name": r.name, "value": r.value, "unit": r.unit, "limit": r.limit} for r in rows]
        write_json(config.out, {"device": name, "label": label, "shape": config.shape, "rows": found})
    failed = [row.name for row in rows if row.passed is False]
    if failed:
        raise ValueError(f"device: {name} fails {', '.join(failed)}")


main = command(check, DeviceCheckConfig, __doc__)

if __name__ == "__main__":
    sys.exit(main())
