"""PPO and A2C of Stable-Baselines3 as agents: the same student and environment, with REWRITE as an action to learn.

The policy pi takes token a with probability q(a) (1 - r) and REWRITE with probability r. Here q is the student, and r
is a head on its features. With `gamma` 0 and `ent_coef` 1 the objective in a state is E_pi[reward] + H(pi), whose
maximum, for a rewrite that costs c, is

    pi(a) = p_T(a) / (1 + e^-c),    pi(REWRITE) = 1 / (1 + e^c)

and, if q were fixed, r = sigmoid(D_t - c): the soft gate with alpha 1 and tau = c, found by learning. `act` samples
from q.
"""

from __future__ import annotations

import dataclasses
import math
import time
from functools import partial
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
from agents.checkpoint import damage_as_value_error, load_state, optimizer_tensors, restore_optimizer, save_state
from agents.config import SB3Config
from agents.metrics import HIGH_DIVERGENCE
from agents.rollout_metrics import count_usage, token_metrics
from agents.student_actor import StudentActor
from distill_env.divergence import reverse_kl
from distill_env.env import DistillVectorEnv
from distill_env.models.base import TrainableModel, ids_of
from distill_env.models.load import build_model

STATE_NUMBERS = 2**22  # log-probabilities of the states in which REWRITE is looked at


class SB3Agent:
    """A student trained by an algorithm of Stable-Baselines3.

    Args:
        student: the student, trained in place. If none of its parameters has `requires_grad`, only the heads learn.
        config: the algorithm and its settings.
    """

    def __init__(self, student: TrainableModel, config: SB3Config) -> None:
        self.student = student
        self.config = config
        self.heads = Heads(student)
        parameters = [*student.parameters(), *self.heads.parameters()]
        self.optimizer: torch.optim.Optimizer  # with the defaults of Stable-Baselines3
        if config.algorithm == "ppo":
            self.optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, eps=1e-5)
        else:
            self.optimizer = torch.optim.RMSprop(parameters, lr=config.learning_rate, alpha=0.99, eps=1e-5)
        self.iteration = 0
        self.actor = StudentActor(student, config.seed)

    def learn(self, env: Any, iterations: int, callback: Callback | None = None) -> SB3Agent:
        """Train for `iterations` more iterations.

        Every call starts new episodes, seeded by the configuration and the number of iterations done. Sampling uses
        the global random generators, as in Stable-Baselines3.

        Args:
            env: a `DistillVectorEnv` with autoreset SAME_STEP and `chunk=1`, wrapped or not.
            iterations: number of rollouts, each followed by an update.
            callback: called after every iteration.

        Raises:
            ValueError: for another environment.
            FloatingPointError: if the student's log-probabilities or the loss are NaN or infinite.
        """
        core = self._check(env)
        vec_env = SB3VecEnv(env)
        algorithm = self._make_algorithm(VecMonitor(vec_env, info_keywords=("tokens", "grade")), core.max_new_tokens)
        steps = algorithm.n_steps * vec_env.num_envs
        for _ in range(iterations):
            started, written_before = time.perf_counter(), vec_env.written.copy()
            with count_usage(core) as usage:
                algorithm.learn(steps, log_interval=2, reset_num_timesteps=False)  # of 1 iteration: never prints a log
            self.iteration += 1
            metrics = self._train_metrics(algorithm) | _episode_metrics(algorithm)
            metrics |= self._rewrite_metrics(algorithm, core)
            metrics |= token_metrics(*(vec_env.written - written_before))
            metrics |= {f"cost/teacher_{key}": float(count) for key, count in vars(usage).items()}
            metrics["time/seconds"] = time.perf_counter() - started
            metrics["time/tokens_per_second"] = metrics["rollout/tokens"] / metrics["time/seconds"]
            if callback is not None:
                callback(self.iteration, metrics)
        return self

    def _check(self, env: Any) -> DistillVectorEnv:
        core = env.unwrapped
        if not isinstance(core, DistillVectorEnv):
            raise ValueError(f"env: a {type(core).__name__}; expected a DistillVectorEnv, wrapped or not")
        mode, expected = core.autoreset_mode.value, AutoresetMode.SAME_STEP.value
        if mode != expected or core.chunk != 1:
            raise ValueError(f"env: autoreset_mode is {mode} and chunk is {core.chunk}; expected {expected} and 1")
        if core.observation != "ids":
            raise ValueError(f"env: its observation is {core.observation!r}; expected 'ids', which the student reads")
        if core.vocab_size != self.student.vocab_size:
            raise ValueError(f"student: {self.student.vocab_size} ids; expected the environment's {core.vocab_size}")
        return core

    def _make_algorithm(self, env: VecEnv, horizon: int) -> PPO | A2C:
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
            "stats_window_size": states,  # an upper bound on the completions of an iteration
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
        """The algorithm's own `train/` metrics, and `train/loss` and `train/entropy`."""
        logged = algorithm.logger.name_to_value
        metrics = {key: float(value) for key, value in logged.items() if key.startswith("train/")}
        metrics["train/entropy"] = -metrics["train/entropy_loss"]
        if "train/loss" not in metrics:  # A2C logs its terms only
            metrics["train/loss"] = (
                metrics["train/policy_loss"]
                + algorithm.ent_coef * metrics["train/entropy_loss"]
                + algorithm.vf_coef * metrics["train/value_loss"]
            )
        if not math.isfinite(loss := metrics["train/loss"]):
            raise FloatingPointError(f"iteration {self.iteration}: the loss is {loss}; lower the learning_rate")
        return metrics

    @torch.no_grad()
    def _rewrite_metrics(self, algorithm: PPO | A2C, core: DistillVectorEnv) -> Metrics:
        """D_t in some states of the last rollout, and how likely REWRITE is where it is low and where it is high.

        `rollout/divergence` is the mean D_t; `rollout/rewrite_easy` and `rollout/rewrite_hard` are the mean P(REWRITE)
        where D_t is below `HIGH_DIVERGENCE` and where it is not; `rollout/rewrite_correlation` is the correlation of
        P(REWRITE) with D_t. A teacher that cannot be read apart from the rollout gives none of them.
        """
        if (
            core.teacher_top_k
            or core.teacher_sees_more
            or core.teacher_usage_by_name
            or not hasattr(core.teacher, "fork")
        ):
            return {}
        seen = algorithm.rollout_buffer.observations.reshape(-1, core.max_prompt_length + core.max_new_tokens)
        count = max(1, min(len(seen), 256, STATE_NUMBERS // core.vocab_size))
        chosen = seen[np.linspace(0, len(seen) - 1, count).astype(int)].astype(np.int64)
        log_p = core.teacher.fork().start([row[row >= 0].tolist() for row in chosen]).cpu()
        log_pi = torch.from_numpy(self.action_log_probs(chosen))  # [m, V + 1]
        divergence = reverse_kl(log_pi[:, :-1].log_softmax(-1), log_p.double()).clamp(min=0).numpy()
        rewrite, hard = log_pi[:, -1].exp().numpy(), divergence >= HIGH_DIVERGENCE
        metrics = {"rollout/divergence": float(divergence.mean())}
        for name, where in (("easy", ~hard), ("hard", hard)):
            if where.any():
                metrics[f"rollout/rewrite_{name}"] = float(rewrite[where].mean())
        if min(divergence.std(), rewrite.std()) > 1e-12:
            metrics["rollout/rewrite_correlation"] = float(np.corrcoef(divergence, rewrite)[0, 1])
        return metrics

    def reseed(self, seed: int) -> None:
        """Seed the draws of `act`, which then repeat."""
        self.actor.reseed(seed)

    def act(self, observation: NDArray[np.int64], info: dict[str, Any] | None = None) -> NDArray[np.int64]:
        """Sample a token for every row of [n, T], never REWRITE."""
        return self.actor.act(observation)

    def act_on_call(self, observation: NDArray[np.int64], info: dict[str, Any] | None = None) -> NDArray[np.int64]:
        """Sample an action for every row of [n, T] from pi, REWRITE included."""
        return self.actor.draw(torch.from_numpy(self.action_log_probs(observation)))

    def log_probs(self, observation: NDArray[np.int64]) -> NDArray[np.float64]:
        """log q, from which `act` samples: [n, T] -> [n, V], nats."""
        return self.actor.log_probs(observation).double().cpu().numpy()

    @torch.no_grad()
    def action_log_probs(self, observation: NDArray[np.int64]) -> NDArray[np.float64]:
        """log pi, from which training samples, REWRITE last: [n, T] -> [n, V + 1], nats."""
        return self.policy_and_value(torch.from_numpy(observation))[0].double().cpu().numpy()

    def policy_and_value(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """log pi and the values of states: [n, T] -> [n, V + 1], [n, 1].

        Raises:
            FloatingPointError: if log pi has NaN.
        """
        features = state_features(self.student, observation)
        log_q = self.student.head(features).float()  # [n, V]
        rewrite, value = self.heads(features)  # [n, 1] each
        log_pi = torch.cat([log_q + logsigmoid(-rewrite), logsigmoid(rewrite)], -1)
        if bool(log_pi.isnan().any()):
            raise FloatingPointError(f"iteration {self.iteration + 1}: the student is NaN; lower the learning_rate")
        return log_pi, value

    def save(self, path: str | Path) -> None:
        """Write the student, the heads and the optimiser to a folder.

        A loaded agent learns what this one would in its next call of `learn`, which starts new episodes.
        """
        write_folder(path, self._write)

    def _write(self, folder: Path) -> None:
        self.student.save_pretrained(folder / "student")
        tensors, groups = optimizer_tensors(self.optimizer)
        save_state(folder, "optimizer", tensors, {"param_groups": groups})
        state = {
            "config": dataclasses.asdict(self.config),
            "ids": ids_of(self.student),
            "iteration": self.iteration,
        }
        save_state(folder, "agent", self.heads.state_dict(), state)

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> SB3Agent:
        """Load what `save` wrote; `options` are passed to `build_model`, which loads the student."""
        folder = Path(path)
        heads, state = load_state(folder, "agent")
        optimizer, saved = load_state(folder, "optimizer")
        with damage_as_value_error(folder):
            # the saved head may have more rows
            agent = cls(build_model(folder / "student", **state["ids"], **options), SB3Config(**state["config"]))
            agent.heads.load_state_dict(heads)
            restore_optimizer(agent.optimizer, optimizer, saved["param_groups"])
            agent.iteration = state["iteration"]
        return agent


class Heads(nn.Module):
    """The logit of REWRITE and the value of a state, both 0 at first.

    Each is linear in the student's features, or a table if the student is one (its features are the state's index).
    """

    def __init__(self, student: Any) -> None:
        super().__init__()
        probe = state_features(student, torch.tensor([[0]]))  # [1, d], or [1]
        table = not probe.is_floating_point()
        make: Any = partial(nn.Embedding, len(student.next_state)) if table else partial(nn.Linear, probe.shape[-1])
        self.rewrite, self.value = make(1), make(1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.to(probe.device)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[n, ...] -> [n, 1], [n, 1]. The value has no gradient in the student."""
        features = features.float() if features.is_floating_point() else features
        return self.rewrite(features), self.value(features.detach())


class StudentPolicy(ActorCriticPolicy):
    """The agent's student, heads and optimiser as a policy of Stable-Baselines3 over `Discrete(V + 1)`."""

    action_dist: CategoricalDistribution

    def __init__(self, *args: Any, agent: SB3Agent, **kwargs: Any) -> None:
        self.agent = agent
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.heads = self.agent.heads
        self.student_weights = nn.ParameterList(self.agent.student.parameters())
        self.optimizer = self.agent.optimizer

    def _distribution_and_value(self, obs: Any) -> tuple[CategoricalDistribution, Tensor]:
        log_pi, value = self.agent.policy_and_value(obs)
        return self.action_dist.proba_distribution(log_pi), value

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        distribution, values = self._distribution_and_value(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, values, distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        distribution, values = self._distribution_and_value(obs)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Any) -> CategoricalDistribution:
        return self._distribution_and_value(obs)[0]

    def predict_values(self, obs: Any) -> Tensor:
        return self._distribution_and_value(obs)[1]


class SB3VecEnv(VecEnv):
    """A Gymnasium vector environment with autoreset SAME_STEP as a `VecEnv` of Stable-Baselines3.

    The info of a row is empty except at the end of a completion. There it has the keys of Stable-Baselines3, `tokens`
    (the completion's length) and `grade`. `written` counts all tokens so far, and those that the teacher wrote.
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
        """Do nothing: the caller made the environment and closes it."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("set attributes on the Gymnasium environment")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        raise NotImplementedError("call methods of the Gymnasium environment")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


def state_features(student: TrainableModel, observation: Tensor) -> Tensor:
    """The input of the student's head: [n, T] padded with -1, integers in any dtype -> [n, ...]."""
    rows = [row[row >= 0].tolist() for row in observation.long().cpu().numpy()]
    return student.features(rows, torch.zeros(len(rows), 1, dtype=torch.long), torch.ones(len(rows), 1).bool())


def _episode_metrics(algorithm: PPO | A2C) -> Metrics:
    """Means over the completions that have ended since the last call; empty if there are none."""
    ended = algorithm.ep_info_buffer
    assert ended is not None
    names = {"r": "reward", "tokens": "length", "grade": "grade"}
    metrics = {f"rollout/{name}": float(np.mean([e[key] for e in ended])) for key, name in names.items() if ended}
    ended.clear()
    return metrics
