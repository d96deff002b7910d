"""The results of a benchmark as Markdown, by the template `benchmark.md.j2`."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any


def benchmark_report(results: dict[str, Any]) -> str:
    """A page of what was measured."""
    from jinja2 import Environment, FileSystemLoader

    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **options)
    environment.filters |= {"median": median, "range": median_and_range, "tokens_per_second": tokens_per_second}
    return environment.get_template("benchmark.md.j2").render(results=results)


def median_and_range(seconds: list[float]) -> str:
    """`1.23 s (1.2-1.31)`: the median, the smallest and the largest."""
    return f"{median(seconds):.3g} s ({min(seconds):.3g}-{max(seconds):.3g})"


def tokens_per_second(run: dict[str, Any]) -> float:
    return run["tokens"] / sum(run["seconds"])
