"""REINFORCE on the environment's rewards, as an agent of one's own: an example of what a plug-in needs.

    python experiments/run.py --agent experiments.recipes.reinforce_agent:Reinforce --learning-rate 1e-3

It never asks the teacher. With `gamma` 0 and `ent_coef` 1 its objective is the reverse KL per token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.checkpoint import load_state, optimizer_tensors, restore_optimizer, save_state
from agents.losses import cost_to_go
from agents.student_actor import StudentActor
from distill_env.models.load import build_model


class Reinforce:
    """Williams 1992, with the batch's mean as the baseline of each position."""

    def __init__(
        self, env: Any, seed: int, student: Any, learning_rate: float = 1e-3, gamma: float = 0.0, ent_coef: float = 1.0
    ) -> None:
        self.student, self.seed, self.iteration = student, seed, 0
        self.gamma, self.ent_coef = gamma, ent_coef
        self.optimizer = torch.optim.Adam(student.parameters(), learning_rate)
        self.actor = StudentActor(student, seed)

    def learn(self, env: Any, iterations: int, callback: Any = None) -> Reinforce:
        for _ in range(iterations):
            prompts, tokens, rewards = self.rollout(env)
            log_q, mask = self.token_log_probs(prompts, tokens), tokens >= 0
            cost = self.ent_coef * log_q.detach() - rewards  # of each token, [n, T]
            future = cost_to_go(cost * mask, self.gamma, include_present=True)
            baseline = (future * mask).sum(0) / mask.sum(0).clamp(min=1)
            loss = ((future - baseline) * log_q * mask).sum() / mask.sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.iteration += 1
            if callback is not None:
                reward = float((rewards * mask).sum() / len(tokens))
                written = float(mask.sum())
                counts = {"rollout/tokens": written, "rollout/student_tokens": written, "rollout/rewritten_share": 0.0}
                callback(self.iteration, {"train/loss": float(loss.detach()), "rollout/reward": reward, **counts})
        return self

    def rollout(self, env: Any) -> tuple[list[tuple[int, ...]], Tensor, Tensor]:
        """One completion in every row: prompts, tokens [n, T] padded with -1, and rewards [n, T]."""
        observation, _ = env.reset(
            seed=[1_000_000 * self.iteration + 1000 * self.seed + i for i in range(env.num_envs)]
        )
        prompts = [tuple(row[row >= 0].tolist()) for row in observation]
        active, tokens, rewards = np.ones(env.num_envs, np.bool_), [], []
        while active.any():
            action = self.actor.act(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            tokens.append(np.where(active, action, -1))
            rewards.append(np.where(active, reward, 0.0))
            active &= ~(terminated | truncated)
        return prompts, torch.from_numpy(np.stack(tokens, 1)), torch.from_numpy(np.stack(rewards, 1))

    def token_log_probs(self, prompts: list[tuple[int, ...]], tokens: Tensor) -> Tensor:
        """log q of the tokens, [n, T], with gradient."""
        mask = tokens >= 0
        log_probs = self.student.head(self.student.features(prompts, tokens, mask))
        log_q = torch.zeros(tokens.shape, dtype=torch.float64)
        log_q[mask] = log_probs.gather(1, tokens[mask][:, None])[:, 0].double()
        return log_q

    def act(self, observation: Any, info: Any = None) -> Any:
        return self.actor.act(observation)

    def log_probs(self, observation: Any) -> Any:
        return self.actor.log_probs(observation).double().numpy()

    def reseed(self, seed: int) -> None:
        self.actor.reseed(seed)

    def save(self, path: str | Path) -> None:
        self.student.save_pretrained(Path(path) / "student")
        tensors, groups = optimizer_tensors(self.optimizer)
        state = {name: getattr(self, name) for name in ("seed", "iteration", "gamma", "ent_coef")}
        save_state(Path(path), "optimizer", tensors, state | {"param_groups": groups})

    @classmethod
    def load(cls, path: str | Path) -> Reinforce:
        tensors, state = load_state(Path(path), "optimizer")
        student = build_model(Path(path) / "student")
        agent = cls(None, state["seed"], student, gamma=state["gamma"], ent_coef=state["ent_coef"])
        restore_optimizer(agent.optimizer, tensors, state["param_groups"])
        agent.iteration = state["iteration"]
        return agent
