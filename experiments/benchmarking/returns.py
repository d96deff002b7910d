"""What simple policies return in a registered environment: the scale on which an agent's returns are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorWrapper
from numpy.typing import NDArray

from distill_env import ENVIRONMENTS
from distill_env.randomness import Purpose, uniform
from experiments.running.metric_display import markdown_table

Policy = Callable[[Any, NDArray[np.float32]], NDArray[np.int64]]
"""From the environment and the teacher's log-probabilities [n, V] to actions [n]."""


@dataclass(frozen=True)
class Returns:
    """Over whole episodes, each begun by another seed."""

    mean: float
    deviation: float  # between episodes
    steps: float  # actions in an episode, on average


def like_teacher(env: Any, log_probs: NDArray[np.float32]) -> NDArray[np.int64]:
    draws = uniform(env.completions.keys, env.completions.lengths, Purpose.STUDENT)
    cumulative = np.exp(log_probs.astype(np.float64)).cumsum(1)
    return (cumulative <= (draws * cumulative[:, -1])[:, None]).sum(1).clip(max=env.vocab_size - 1)


def at_random(env: Any, log_probs: NDArray[np.float32]) -> NDArray[np.int64]:
    draws = uniform(env.completions.keys, env.completions.lengths, Purpose.STUDENT)
    return (draws * (env.vocab_size + 1)).astype(np.int64)


POLICIES: dict[str, Policy] = {
    "the teacher's likeliest token": lambda env, log_probs: log_probs.argmax(1),
    "write like the teacher": like_teacher,
    "always REWRITE": lambda env, log_probs: np.full(env.num_envs, env.rewrite_action),
    "end at once": lambda env, log_probs: np.full(env.num_envs, env.task.eos_token_id),
    "random actions": at_random,
}


def reference_returns(env_id: str, policy: Policy, episodes: int, seed: int = 0, **kwargs: Any) -> Returns:
    """Undiscounted returns of a policy, one episode in each of `episodes` rows."""
    env: Any = gym.make_vec(env_id, num_envs=episodes, autoreset_mode="Disabled", **kwargs).unwrapped
    _, info = env.reset(seed=seed)
    returns, steps, live = np.zeros(episodes), 0, np.ones(episodes, np.bool_)
    while live.any():
        actions = np.where(live, policy(env, info["teacher_log_probs"]), -1)
        _, reward, terminated, truncated, info = env.step(actions)
        returns, steps = returns + reward, steps + int(live.sum())
        live &= ~(terminated | truncated)
    return Returns(float(returns.mean()), float(returns.std()), steps / episodes)


def returns_table(episodes: int) -> str:
    """All policies in all registered environments, as Markdown."""
    lines = [["", *(f"`{env_id}`" for env_id in ENVIRONMENTS)]]
    for name, policy in POLICIES.items():
        found = [reference_returns(env_id, policy, episodes) for env_id in ENVIRONMENTS]
        lines.append([name, *(f"{r.mean:.1f} ± {r.deviation:.1f}" for r in found)])
    return markdown_table(lines)


class CutOffTruncates(VectorWrapper[Any, Any, Any, Any, Any]):
    """Reports the horizon as a truncation instead of a termination."""

    def step(self, actions: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(actions)
        ending = info.get("final_info", info)
        cut_off = ending["cut_off"] & ending["_cut_off"] if "cut_off" in ending else np.zeros_like(truncated)
        return observation, reward, terminated & ~cut_off, truncated | cut_off, info


@dataclass(frozen=True)
class PPOSettings:
    """What varies between the runs of Stable-Baselines3's PPO; all else is its default."""

    gamma: float = 0.99
    ent_coef: float = 0.0
    truncates: bool = False  # whether the horizon truncates


def ppo_return(env_id: str, settings: PPOSettings, steps: int, seed: int) -> float:
    """The mean return of the last 100 episodes of PPO, 16 environments at a time."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecMonitor

    from agents.sb3 import SB3VecEnv

    envs = gym.make_vec(env_id, num_envs=16, autoreset_mode="SameStep", reveal_teacher=False)
    vec_env = VecMonitor(SB3VecEnv(CutOffTruncates(envs) if settings.truncates else envs))
    options: dict[str, Any] = {"n_steps": 128, "seed": seed, "device": "cpu"}
    model = PPO("MlpPolicy", vec_env, gamma=settings.gamma, ent_coef=settings.ent_coef, **options)
    model.learn(steps)
    assert model.ep_info_buffer is not None
    return float(np.mean([episode["r"] for episode in model.ep_info_buffer]))


def ppo_table(env_id: str, steps: int, seeds: int) -> str:
    """PPO under several settings, as Markdown: the mean over seeds, and each seed."""
    lines = [["gamma", "horizon", "mean return", "each seed"]]
    for settings in (PPOSettings(), PPOSettings(truncates=True), PPOSettings(0.5), PPOSettings(0.0)):
        found = [ppo_return(env_id, settings, steps, seed) for seed in range(seeds)]
        horizon = "truncation" if settings.truncates else "termination"
        each = ", ".join(f"{value:.1f}" for value in found)
        lines.append([str(settings.gamma), horizon, f"{np.mean(found):.2f}", each])
    return markdown_table(lines)
