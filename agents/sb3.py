"""PPO and A2C of Stable-Baselines3 as agents: the same student and environment, REWRITE an action to be learned.

The policy pi writes token a with probability q(a) (1 - r) and REWRITE with probability r; q is the student, r a head on
its features. With `gamma` 0 and `ent_coef` 1 a state is worth E_pi[reward] + H(pi), which is largest at

    pi(a) = p_T(a) / (1 + e^-tau),    pi(REWRITE) = 1 / (1 + e^tau)

and, were q frozen, at r = sigmoid(D_t - tau): the soft gate with alpha 1, found by learning. Deployed, it writes from
q.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecMonitor
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from agents.atomic_io import write_folder
from agents.base import Callback, Metrics
from agents.checkpoint import (
    damage_as_value_error,
    existing_folder,
    load_state,
    optimizer_tensors,
    restore_optimizer,
    save_state,
)
from agents.config import SB3Config
from agents.student_actor import StudentActor
from distill_env.env import DistillVectorEnv
from distill_env.models.base import TrainableModel
from distill_env.models.load import build_model


class SB3Agent:
    """A student that learns by an algorithm of Stable-Baselines3.

    Args:
        student: what is trained, in place. Parameters without `requires_grad` stay as they are; with none that has it,
            only handing over is learned.
        config: how.
    """

    def __init__(self, student: TrainableModel, config: SB3Config) -> None:
        self.student = student
        self.config = config
        self.heads = Heads(student)
        parameters = [*student.parameters(), *self.heads.parameters()]
        self.optimizer: torch.optim.Optimizer  # as Stable-Baselines3 would make it
        if config.algorithm == "ppo":
            self.optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, eps=1e-5)
        else:
            self.optimizer = torch.optim.RMSprop(parameters, lr=config.learning_rate, alpha=0.99, eps=1e-5)
        self.iteration = 0
        self.actor = StudentActor(student, config.seed)

    # ------------------------------------------------------------------ learning

    def learn(self, env: Any, iterations: int, callback: Callback | None = None) -> SB3Agent:
        """Train for that many more iterations.

        Every call begins with fresh episodes, seeded by the configuration and the number of iterations done; it draws
        from the global generators, as Stable-Baselines3 does.

        Args:
            env: a `DistillVectorEnv` with autoreset SAME_STEP and `chunk=1`, wrapped or not.
            iterations: number of rollouts, each with its update.
            callback: is told of every iteration.

        Raises:
            ValueError: for another environment.
            FloatingPointError: when the student's log-probabilities or the loss are no longer numbers.
        """
        core = self._check(env)
        rows = RowsForSB3(env)
        algorithm = self._algorithm(VecMonitor(rows, info_keywords=("tokens", "grade")), core.max_new_tokens)
        for _ in range(iterations):
            started = time.perf_counter()
            teacher_before = dataclasses.astuple(core.teacher_usage)
            written_before = rows.written.copy()
            steps = algorithm.n_steps * rows.num_envs
            algorithm.learn(steps, log_interval=2, reset_num_timesteps=False)  # one iteration: too few to print a log
            self.iteration += 1
            metrics = self._train_metrics(algorithm)
            metrics |= _episode_metrics(algorithm)
            metrics |= _token_metrics(*(rows.written - written_before))
            teacher = np.subtract(dataclasses.astuple(core.teacher_usage), teacher_before)
            for key, value in zip(("passes", "positions", "tokens"), teacher, strict=True):
                metrics[f"cost/teacher_{key}"] = float(value)
            metrics["time/seconds"] = time.perf_counter() - started
            metrics["time/tokens_per_second"] = metrics["rollout/tokens"] / metrics["time/seconds"]
            if callback is not None:
                callback(self.iteration, metrics)
        return self

    def _check(self, env: Any) -> DistillVectorEnv:
        core = env.unwrapped
        if not isinstance(core, DistillVectorEnv):
            raise ValueError(f"env: {type(core).__name__}; accepted: a DistillVectorEnv, wrapped or not")
        if core.autoreset_mode is not AutoresetMode.SAME_STEP or core.chunk != 1:
            raise ValueError(
                f"env: autoreset_mode is {core.autoreset_mode.value} and chunk is {core.chunk}; "
                f"Stable-Baselines3 needs {AutoresetMode.SAME_STEP.value} and 1"
            )
        if core.vocab_size != self.student.vocab_size:
            raise ValueError(f"student: {self.student.vocab_size} token ids, the environment has {core.vocab_size}")
        return core

    def _algorithm(self, env: VecEnv, horizon: int) -> PPO | A2C:
        config = self.config
        n_steps = max(1, round(config.batch_size * horizon / env.num_envs))
        states = n_steps * env.num_envs
        options: dict[str, Any] = {
            "learning_rate": config.learning_rate,
            "n_steps": n_steps,
            "gamma": config.gamma,
            "ent_coef": config.ent_coef,
            "max_grad_norm": config.max_grad_norm,
            "normalize_advantage": config.normalize_advantage,
            "policy_kwargs": {"agent": self, "ortho_init": False},
            "stats_window_size": states,  # no iteration finishes more answers
            "seed": int(np.random.SeedSequence([config.seed, self.iteration]).generate_state(1)[0]),
            "device": next(self.heads.parameters()).device,
        }
        algorithm: PPO | A2C
        if config.algorithm == "ppo":
            parts = next(d for d in range(min(config.minibatches, states), 0, -1) if states % d == 0)
            algorithm = PPO(StudentPolicy, env, batch_size=states // parts, n_epochs=config.n_epochs, **options)
        else:
            algorithm = A2C(StudentPolicy, env, **options)
        algorithm.set_logger(Logger(None, []))
        return algorithm

    def _train_metrics(self, algorithm: PPO | A2C) -> Metrics:
        """What the algorithm logged of its update, under its own names, and `train/loss`."""
        logged = algorithm.logger.name_to_value
        metrics = {key: float(value) for key, value in logged.items() if key.startswith("train/")}
        if "train/loss" not in metrics:  # A2C logs the parts
            metrics["train/loss"] = (
                metrics["train/policy_loss"]
                + algorithm.ent_coef * metrics["train/entropy_loss"]
                + algorithm.vf_coef * metrics["train/value_loss"]
            )
        if not math.isfinite(metrics["train/loss"]):
            raise FloatingPointError(
                f"iteration {self.iteration}: the loss is {metrics['train/loss']}; go on from the last checkpoint with "
                "a lower learning rate"
            )
        return metrics

    # ------------------------------------------------------------------ acting

    def reseed(self, seed: int) -> None:
        """After this `act` repeats itself."""
        self.actor.reseed(seed)

    def act(self, observation: NDArray[np.int64], info: dict[str, Any] | None = None) -> NDArray[np.int64]:
        """Sample a token for every row of [n, T], never REWRITE."""
        return self.actor.act(observation)

    def log_probs(self, observation: NDArray[np.int64]) -> NDArray[np.float64]:
        """log q, the distribution that `act` samples from, [n, T] -> [n, V], nats."""
        return self.actor.log_probs(observation).double().cpu().numpy()

    @torch.no_grad()
    def action_log_probs(self, observation: NDArray[np.int64]) -> NDArray[np.float64]:
        """log pi, the distribution that it trains with, REWRITE last, [n, T] -> [n, V + 1], nats."""
        return self.judge(torch.from_numpy(observation))[0].double().cpu().numpy()

    def judge(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """log pi and the value of states, [n, T] -> [n, V + 1], [n, 1].

        Raises:
            FloatingPointError: if log pi is not a number.
        """
        features = state_features(self.student, observation)
        log_q = self.student.head(features).float()  # [n, V]
        rewrite, value = self.heads(features)  # [n, 1] each
        log_pi = torch.cat([log_q + logsigmoid(-rewrite), logsigmoid(rewrite)], -1)
        if bool(log_pi.isnan().any()):
            raise FloatingPointError(
                f"iteration {self.iteration + 1}: the student's log-probabilities are not numbers; go on from the last "
                "checkpoint with a lower learning rate"
            )
        return log_pi, value

    # ------------------------------------------------------------------ on disk

    def save(self, path: str | Path) -> None:
        """Write the student, the heads and the optimiser.

        An agent loaded from there goes on as this one would in its next call of `learn`: with fresh episodes.
        """
        write_folder(path, self._write)

    def _write(self, folder: Path) -> None:
        self.student.save_pretrained(folder / "student")
        optimizer, groups = optimizer_tensors(self.optimizer)
        tensors = {f"heads/{k}": v for k, v in self.heads.state_dict().items()}
        tensors |= {f"optimizer/{k}": v for k, v in optimizer.items()}
        state = {
            "config": dataclasses.asdict(self.config),
            "vocab_size": self.student.vocab_size,
            "eos_token_id": self.student.eos_token_id,
            "iteration": self.iteration,
            "param_groups": groups,
        }
        save_state(folder, "agent", tensors, state)

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> SB3Agent:
        """Read what `save` wrote; `options` say how the student is loaded, as `build_model` takes them."""
        folder = existing_folder(path)
        tensors, state = load_state(folder, "agent")
        with damage_as_value_error(folder):
            ids = {key: state[key] for key in ("vocab_size", "eos_token_id")}  # the folder's head may have more rows
            agent = cls(build_model(folder / "student", **ids, **options), SB3Config(**state["config"]))
            parts: dict[str, dict[str, Tensor]] = {"heads": {}, "optimizer": {}}
            for name, tensor in tensors.items():
                part, key = name.split("/", 1)
                parts[part][key] = tensor
            agent.heads.load_state_dict(parts["heads"])
            restore_optimizer(agent.optimizer, parts["optimizer"], state["param_groups"])
            agent.iteration = state["iteration"]
        return agent


class Heads(nn.Module):
    """Two numbers for a state beside the student's log q: the logit of REWRITE and the value. Both begin at 0.

    They are linear in the student's features; where these are but the number of a state, as in a table, a table each.
    """

    def __init__(self, student: Any) -> None:
        super().__init__()
        probe = state_features(student, torch.tensor([[0]]))  # [1, d], or [1]
        self.rewrite: nn.Linear | nn.Embedding
        self.value: nn.Linear | nn.Embedding
        if probe.is_floating_point():
            self.rewrite, self.value = nn.Linear(probe.shape[-1], 1), nn.Linear(probe.shape[-1], 1)
        else:
            states = len(student.next_state)
            self.rewrite, self.value = nn.Embedding(states, 1), nn.Embedding(states, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.to(probe.device)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[n, ...] -> [n, 1], [n, 1]. The value is no reason to move the student."""
        features = features.float() if features.is_floating_point() else features
        return self.rewrite(features), self.value(features.detach())


class StudentPolicy(ActorCriticPolicy):
    """The student and its heads as a policy over `Discrete(V + 1)`, made of and optimised by what the agent owns."""

    action_dist: CategoricalDistribution

    def __init__(self, *args: Any, agent: SB3Agent, **kwargs: Any) -> None:
        self.agent = agent
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.heads = self.agent.heads
        self.student_weights = nn.ParameterList(self.agent.student.parameters())
        self.optimizer = self.agent.optimizer

    def _look(self, obs: Any) -> tuple[CategoricalDistribution, Tensor]:
        log_pi, value = self.agent.judge(obs)
        return self.action_dist.proba_distribution(log_pi), value

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        distribution, values = self._look(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, values, distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        distribution, values = self._look(obs)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Any) -> CategoricalDistribution:
        return self._look(obs)[0]

    def predict_values(self, obs: Any) -> Tensor:
        return self._look(obs)[1]


class RowsForSB3(VecEnv):
    """A Gymnasium vector environment with autoreset SAME_STEP as Stable-Baselines3's own kind.

    Its infos are empty but at an end, where they say what Stable-Baselines3 has to know, and of the answer `tokens`,
    its length, and `grade`. `written` counts all tokens that were written and, of those, the teacher's.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.env = env
        self.written = np.zeros(2, np.int64)
        self._lengths = np.zeros(env.num_envs, np.int64)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> NDArray[np.int64]:
        seeds: Any = list(self._seeds)
        observation, _ = self.env.reset(seed=seeds)
        self._reset_seeds()
        self._lengths[:] = 0
        return observation

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        observation, rewards, terminated, truncated, info = self.env.step(self._actions)
        final = info.get("final_info", {})
        for part in (info, final):
            if "tokens" in part:
                written = (part["tokens"] >= 0) & part["_tokens"][:, None]  # [n, W]
                self._lengths += written.sum(1)
                self.written += [written.sum(), (written & part["rewritten"]).sum()]
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for row in np.flatnonzero(done):
            infos[row] = {
                "terminal_observation": info["final_obs"][row],
                "TimeLimit.truncated": bool(truncated[row] and not terminated[row]),
                "tokens": int(self._lengths[row]),
                "grade": float(final["grade"][row]) if "grade" in final else 0.0,
            }
        self._lengths[done] = 0
        return observation, rewards.astype(np.float32), done, infos

    def close(self) -> None:
        """Nothing: the environment belongs to the caller."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("the rows are one environment; set attributes on that")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        raise NotImplementedError("the rows are one environment; call its methods")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * len(self._rows(indices))

    def _rows(self, indices: Any) -> Sequence[int]:
        return list(self._get_indices(indices))


def state_features(student: TrainableModel, observation: Tensor) -> Tensor:
    """What the student's head needs to know of states, [n, T] padded with -1, integers in any dtype -> [n, ...]."""
    rows = [row[row >= 0].tolist() for row in observation.long().cpu().numpy()]
    return student.features(rows, torch.zeros(len(rows), 1, dtype=torch.long), torch.ones(len(rows), 1).bool())


def _episode_metrics(algorithm: PPO | A2C) -> Metrics:
    """Means over the answers that have ended since the last call; none if none has."""
    ended = algorithm.ep_info_buffer
    assert ended is not None
    names = {"r": "reward", "tokens": "length", "grade": "grade"}
    metrics = {f"rollout/{name}": float(np.mean([e[key] for e in ended])) for key, name in names.items() if ended}
    ended.clear()
    return metrics


def _token_metrics(tokens: int, rewritten: int) -> Metrics:
    own = tokens - rewritten
    return {
        "rollout/tokens": float(tokens),
        "rollout/student_tokens": float(own),
        "rollout/rewritten_share": float(rewritten / max(tokens, 1)),
        "rollout/teacher_tokens_per_student_token": float(rewritten / max(own, 1)),
    }
