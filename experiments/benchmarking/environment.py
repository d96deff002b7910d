"""The speed of the environment alone."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np

from distill_env.env import DistillVectorEnv
from experiments.benchmarking.config import BenchmarkConfig
from experiments.benchmarking.timing import alternate

STEPS, SINGLE_STEPS = 200, 10_000
CONTENDERS = (("toy", "Distill/Categorical-v0", 7), ("cartpole", "CartPole-v1", 2))  # name, id, actions


def measure_environment(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """Steps a second of the toy environment and of CartPole, and the environment's share of PPO's time.

    The first entry is the single form, as `gym.make` returns it, with a reset after every episode.
    """
    single = {name: partial(play, gym.make(env_id), n_actions) for name, env_id, n_actions in CONTENDERS}
    times = alternate(single, config.repetitions)
    results: list[dict[str, Any]] = [{"rows": "single", **{k: SINGLE_STEPS / median(v) for k, v in times.items()}}]
    for rows in (1, 64, 1024):
        batches = {name: partial(play_batch, made(env_id, rows), n) for name, env_id, n in CONTENDERS}
        times = alternate(batches, config.repetitions)
        results.append({"rows": rows, **{k: STEPS * rows / median(v) for k, v in times.items()}})
    results[0]["ppo_share"] = ppo_share()
    return results


def made(env_id: str, rows: int) -> Any:
    return gym.make_vec(env_id, num_envs=rows, vectorization_mode="vector_entry_point")


def play(env: Any, n_actions: int) -> None:
    """`SINGLE_STEPS` random actions."""
    env.reset(seed=0)
    for action in np.random.default_rng(0).integers(0, n_actions, SINGLE_STEPS).tolist():
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()


def play_batch(env: Any, n_actions: int) -> None:
    """`STEPS` random actions in every row, which are reset by themselves."""
    env.reset(seed=0)
    for actions in np.random.default_rng(0).integers(0, n_actions, (STEPS, env.num_envs)):
        env.step(actions)


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
