"""The speed of the environment alone."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from distill_env.env import DistillVectorEnv
from experiments.benchmarking.config import BenchmarkConfig
from experiments.benchmarking.timing import alternate

STEPS = 200


def measure_environment(config: BenchmarkConfig) -> list[dict[str, float]]:
    """Steps a second of the toy environment and of CartPole, and the environment's share of PPO's time."""
    import gymnasium as gym

    def run(env: Any, actions: Any) -> None:
        for action in actions:
            env.step(action)

    results = []
    for rows in (1, 64, 1024):
        toy: Any = gym.make_vec("Distill/Categorical-v0", num_envs=rows)
        pole: Any = gym.make_vec("CartPole-v1", num_envs=rows, vectorization_mode="vector_entry_point")
        contenders = {}
        for name, env, n_actions in (("toy", toy, 7), ("cartpole", pole, 2)):
            env.reset(seed=0)
            actions = np.random.default_rng(0).integers(0, n_actions, (STEPS, rows))
            contenders[name] = partial(run, env, actions)
        times = alternate(contenders, config.repetitions)
        results.append({"rows": rows, **{k: STEPS * rows / median(v) for k, v in times.items()}})
    results[0]["ppo_share"] = ppo_share()
    return results


def ppo_share() -> float:
    """The share of PPO's time that the toy environment takes, 64 rows of Distill/Categorical-v0."""
    from agents.config import SB3Config
    from agents.sb3 import SB3Agent
    from distill_env.models.tabular import uniform

    env = DistillVectorEnv(64, "categorical", "markov", autoreset_mode="SameStep")
    inside = 0.0
    step = env.step

    def timed(actions: Any) -> Any:
        nonlocal inside
        started = time.perf_counter()
        result = step(actions)
        inside += time.perf_counter() - started
        return result

    env.step = timed  # type: ignore[method-assign]
    agent = SB3Agent(uniform(env.vocab_size), SB3Config(algorithm="ppo", batch_size=64))
    started = time.perf_counter()
    agent.learn(env, 20)
    return inside / (time.perf_counter() - started)
