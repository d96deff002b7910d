"""The agents that the project shows as examples."""

from __future__ import annotations

import json
from pathlib import Path

from experiments import run as run_module

AGENT = "experiments.recipes.reinforce_agent:Reinforce"


def test_reinforce_learns_a_table(tmp_path: Path) -> None:
    """D_t falls to a third; its parameters are flags."""
    flags = ["--agent", AGENT, "--env", "categorical", "--eval-samples", "8", "--learning-rate", "0.05"]
    out = ["--out", str(tmp_path), "--name", "r", "--validate-every", "100"]
    assert run_module.main([*flags, *out, "--iterations", "60"]) == 0
    evaluation = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert evaluation["training"]["iterations"] == 60
    assert evaluation["after"]["divergence"] < evaluation["before"]["divergence"] / 3
