"""Print what simple policies, or PPO, return in the registered environments.

    python experiments/returns.py
    python experiments/returns.py --ppo Distill/Categorical-v0 --steps 50000 --seeds 5

An agent's return is read against these: writing like the teacher returns more than always asking it, and asking more
than ending at once.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from distill_env import ENVIRONMENTS
from distill_env.checks import Count
from experiments.running.cli import command


@dataclass(frozen=True)
class ReturnsConfig:
    """What to measure."""

    episodes: Count = 1000
    """Episodes of each policy in each environment, from seed 0 on."""
    ppo: str = ""
    """An environment in which Stable-Baselines3's PPO is trained instead, under several settings."""
    steps: Count = 50_000
    """Environment steps of each training."""
    seeds: Count = 3
    """Trainings under each setting."""


def returns(config: ReturnsConfig) -> None:
    if config.ppo and config.ppo not in ENVIRONMENTS:
        raise ValueError(f"ppo: {config.ppo!r} is not registered; expected one of {', '.join(ENVIRONMENTS)}")
    from experiments.benchmarking.returns import ppo_table, returns_table  # imports torch, which --help does not need

    print(ppo_table(config.ppo, config.steps, config.seeds) if config.ppo else returns_table(config.episodes))


main = command(returns, ReturnsConfig, __doc__)

if __name__ == "__main__":
    sys.exit(main())
