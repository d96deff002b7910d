"""Print what simple policies, or PPO, return in the registered environments.

    python experiments/returns.py
    python experiments/returns.py --ppo Distill/Categorical-v0 --steps 50000 --seeds 5

An agent's return is read against these: writing like the teacher returns more than always asking it, and asking more
than ending at once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from distill_env import ENVIRONMENTS
from distill_env.checks import check_range, check_types
from experiments.running.cli import command


@dataclass(frozen=True)
class ReturnsConfig:
    """What to measure."""

    episodes: int = 1000
    """Episodes of each policy in each environment, from seed 0 on."""
    ppo: str = ""
    """An environment in which Stable-Baselines3's PPO is trained instead, under several settings."""
    steps: int = 50_000
    """Environment steps of each training."""
    seeds: int = 3
    """Trainings under each setting."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "episodes", "steps", "seeds", least=1)
        if self.ppo and self.ppo not in ENVIRONMENTS:
            raise ValueError(f"ppo: {self.ppo!r} is not registered; expected one of {', '.join(ENVIRONMENTS)}")


def main(config: ReturnsConfig) -> None:
    from experiments.benchmarking.returns import ppo_table, returns_table

    print(ppo_table(config.ppo, config.steps, config.seeds) if config.ppo else returns_table(config.episodes))


if __name__ == "__main__":
    sys.exit(command(main, ReturnsConfig, __doc__))
