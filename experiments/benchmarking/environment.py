"""The environment alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from distill_env.env import DistillVectorEnv
from experiments.benchmarking.timing import Config, alternate, median


def measure_environment(config: Config) -> list[dict[str, float]]:
    """Steps a second of the toy environment and of CartPole, and the environment's share of PPO's time."""
    import gymnasium as gym

    results = []
    for rows in (1, 64, 1024):
        toy: Any = gym.make_vec("Distill/Categorical-v0", num_envs=rows)
        pole: Any = gym.make_vec("CartPole-v1", num_envs=rows, vectorization_mode="vector_entry_point")
        n = 200
        toy_actions = np.random.default_rng(0).integers(0, 7, (n, rows))
        pole_actions = np.random.default_rng(0).integers(0, 2, (n, rows))

        def steps(env: Any, actions: Any) -> Callable[[], None]:
            env.reset(seed=0)

            def contender() -> None:
                for action in actions:
                    env.step(action)

            return contender

        contenders = {"toy": steps(toy, toy_actions), "cartpole": steps(pole, pole_actions)}
        times = alternate(contenders, config.repetitions)
        results.append({"rows": rows, **{k: n * rows / median(v) for k, v in times.items()}})
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
