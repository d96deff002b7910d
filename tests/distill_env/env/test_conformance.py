"""What Gymnasium and Stable-Baselines3 ask of an environment, and what the package registers."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, get_type_hints

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check

from distill_env import ENVIRONMENTS
from distill_env.env import DistillEnv, DistillVectorEnv
from distill_env.env_arguments import EnvArguments, VectorEnvArguments
from distill_env.models.causal_lm import CausalLM
from distill_env.models.load import load_model
from distill_env.models.toy import small_teacher
from experiments.benchmarking.returns import POLICIES, reference_returns
from tests.helpers.environments import REWRITE, V, assert_equal
from tests.helpers.paths import HELPERS, REPOSITORY


@pytest.mark.parametrize("check", [gymnasium_check, sb3_check])
@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_every_id_conforms_without_a_warning(env_id: str, check: Any) -> None:
    """In every render mode, too: Gymnasium's check makes them all. Warnings are errors here."""
    check(gym.make(env_id).unwrapped)


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_ids_make_single_and_vector_environments(env_id: str) -> None:
    """The module-prefixed id needs no import; `make_vec` prefers the batched core."""
    env = gym.make(f"distill_env:{env_id}")
    assert isinstance(env.unwrapped, DistillEnv)
    envs = gym.make_vec(env_id, num_envs=3)
    assert isinstance(envs.unwrapped, DistillVectorEnv)
    assert envs.single_observation_space == env.observation_space
    assert envs.single_action_space == env.action_space
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert DistillVectorEnv.metadata.get("autoreset_mode") is None  # the instance's, not the class's


def test_spaces() -> None:
    env = DistillVectorEnv(3, "sums", "sums")
    length = 14 + 21  # `7+2+9+7+2+9+7=`, and three tokens a digit
    assert env.single_observation_space == gym.spaces.Box(-1, 13, (length,), np.int64)
    assert env.single_action_space == gym.spaces.Discrete(15)
    chunked = DistillVectorEnv(3, "sums", "sums", chunk=4)
    assert chunked.single_action_space == gym.spaces.MultiDiscrete([15] * 4)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_a_spec_survives_json(env_id: str) -> None:
    """What is made from it plays the same episode."""
    env = gym.make(env_id, rewrite="nucleus", rewrite_cost=0.25)
    assert env.spec is not None
    text = env.spec.to_json()
    json.loads(text)
    again = gym.make(EnvSpec.from_json(text))
    assert again.spec == env.spec
    assert_equal(again.reset(seed=5), env.reset(seed=5))
    rewrite = int(env.action_space.n) - 1  # type: ignore[attr-defined]
    for action in (rewrite, 0, rewrite):
        assert_equal(again.step(action), env.step(action))


def test_a_single_file_ppo_written_for_cartpole_learns_here() -> None:
    """Nothing changed but the id."""
    script = HELPERS / "cartpole_ppo.py"
    options = ["--env-id", "distill_env:Distill/Categorical-v0", "--total-timesteps", "2048"]
    command = [sys.executable, str(script), *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    returns = [float(x) for x in re.findall(r"episodic_return=(\S+)", done.stdout)]
    assert len(returns) == 2
    assert returns[1] > returns[0] + 1.0


def test_importing_the_package_is_light() -> None:
    """The ids are there; neither torch nor transformers is, nor after importing wrappers and tasks."""
    code = (
        "import sys, gymnasium, distill_env, distill_env.wrappers, distill_env.tasks.sums\n"
        "assert 'Distill/Sums-v0' in gymnasium.registry\n"
        "print([m for m in ('torch', 'transformers', 'stable_baselines3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_both_environments_take_the_arguments_of_their_types() -> None:
    """`DistillEnv` has the arguments of the vector environment but for `num_envs` and `autoreset_mode`."""
    signature = inspect.signature(DistillVectorEnv).parameters
    assert set(signature) == set(get_type_hints(VectorEnvArguments))
    assert set(signature) - set(get_type_hints(EnvArguments)) == {"num_envs", "autoreset_mode"}


def test_a_single_environment_names_its_actions() -> None:
    env = DistillEnv(task="sums", teacher="sums")
    assert env.vocab_size == env.rewrite_action == 14
    env.reset(seed=0)
    observation, reward, *_, info = env.step(env.rewrite_action)
    assert (reward, info["rewritten"].tolist()) == (-0.5, [True])
    assert info["tokens"][0] in observation


def test_the_defaults_fit_together() -> None:
    """No argument at all makes an environment that runs."""
    env = DistillVectorEnv()
    _, info = env.reset(seed=0)
    assert info["teacher_log_probs"].shape == (1, 6)


def test_a_fresh_language_model_serves_as_a_live_teacher() -> None:
    torch.manual_seed(0)
    env = DistillVectorEnv(2, "sums", CausalLM(small_teacher("sums", 16, 1)), autoreset_mode="Disabled")
    env.reset(seed=0)
    assert env.step(np.array([3, env.rewrite_action]))[0].shape == env.observation_space.shape
    assert load_model("sums").vocab_size == env.vocab_size


WRAPPERS: dict[str, Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]]] = {
    "RecordEpisodeStatistics": gym.wrappers.RecordEpisodeStatistics,
    "NormalizeObservation": gym.wrappers.NormalizeObservation,
    "NormalizeReward": gym.wrappers.NormalizeReward,
    "FrameStackObservation": partial(gym.wrappers.FrameStackObservation, stack_size=3),
    "FlattenObservation": gym.wrappers.FlattenObservation,
    "TimeLimit": partial(gym.wrappers.TimeLimit, max_episode_steps=2),
    "Autoreset": gym.wrappers.Autoreset,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("env_id", ["Distill/Categorical-v0", "Distill/Sums-v0"])
def test_wrappers_of_gymnasium_fit(env_id: str, wrapper: str) -> None:
    """Two episodes in each; a time limit from outside truncates."""
    env = WRAPPERS[wrapper](gym.make(env_id))
    rewrite = env.unwrapped.rewrite_action  # type: ignore[attr-defined]
    truncations = 0
    for seed in range(2):
        observation, _ = env.reset(seed=seed)
        for _ in range(4):
            assert env.observation_space.contains(observation)
            observation, _, terminated, truncated, _ = env.step(rewrite)
            truncations += truncated
            if terminated or truncated:
                break
    assert bool(truncations) == (wrapper == "TimeLimit")


@pytest.mark.parametrize("mode", ["sync", "async", "vector_entry_point"])
def test_every_vectorization_mode_plays(mode: str) -> None:
    envs = gym.make_vec("Distill/Categorical-v0", num_envs=2, vectorization_mode=mode)
    envs.reset(seed=0)
    _, rewards, *_ = envs.step(np.full(2, REWRITE))
    assert rewards.tolist() == [-1.0, -1.0]
    envs.close()


def test_frames_of_an_episode_are_recorded() -> None:
    env = gym.make("Distill/Categorical-v0", render_mode="rgb_array_list")
    env.reset(seed=0)
    env.step(REWRITE)
    frames: Any = env.render()
    assert [frame.shape for frame in frames] == [(240, 800, 3)] * 2


def test_names_of_classes_make_an_environment_that_json_can_hold() -> None:
    """A task and a teacher of one's own, by `package.module:name`."""
    names = {"task": "tests.helpers.tables:Ragged", "teacher": "distill_env.models.tabular:markov"}
    arguments = {"task_kwargs": {"vocab_size": V, "max_new_tokens": 4}, "teacher_kwargs": {"vocab_size": V}}
    env = gym.make("Distill/Categorical-v0", **names, **arguments)
    assert env.spec is not None
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert_equal(again.reset(seed=1), env.reset(seed=1))
    assert_equal(again.step(REWRITE), env.step(REWRITE))


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_writing_well_beats_asking_and_asking_beats_giving_up(env_id: str) -> None:
    write, ask, give_up, random = (
        reference_returns(env_id, POLICIES[name], 300)
        for name in ("write like the teacher", "always REWRITE", "end at once", "random actions")
    )
    assert write.mean > ask.mean + 0.5
    assert ask.mean > give_up.mean + 0.5
    assert give_up.mean > random.mean + 5.0
