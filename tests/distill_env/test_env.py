"""The environment: it is what Gymnasium means by one, the batched one is many single ones, and it pays what it says."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from collections import Counter
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.env_checker import check_env as sb3_check
from torch import Tensor

from distill_env import ENVIRONMENTS
from distill_env.env import DistillEnv, DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.models.load import load_model
from distill_env.models.tabular import TabularModel, markov, suffix_automaton
from distill_env.models.toy import small_teacher
from distill_env.ragged import PAD
from distill_env.randomness import episode_keys
from distill_env.tasks.base import Prompt
from distill_env.tasks.categorical import CategoricalTask
from distill_env.tasks.sums import SumsTask
from distill_env.wrappers import RewriteImplausible, SingleRewriteImplausible
from tests.helpers.paths import HELPERS
from tests.helpers.tables import Ragged

MODES = [mode.value for mode in AutoresetMode]
V, REWRITE = 6, 6  # of Distill/Categorical-v0
Kind = Literal["table", "ragged table", "language model"]
KINDS: list[Kind] = ["table", "ragged table", "language model"]
TOLERANCE = {"table": 0.0, "ragged table": 0.0, "language model": 1e-4}


def arguments_of(kind: Kind, **kwargs: Any) -> dict[str, Any]:
    """A short environment over a table, one with prompts of 0 to 3 tokens and grades, or the shipped language model."""
    if kind != "language model":
        table = {"vocab_size": V, "order": 2, "seed": 1, "sharpness": 1.0}
        task = "categorical" if kind == "table" else Ragged(V, 6)
        return {"task": task, "teacher": "markov", "teacher_kwargs": table, "task_reward": 0.5} | kwargs
    few = {"lengths": (2, 3), "ood_lengths": (4,), "prompts_per_length": 5}
    return {"task": "sums", "teacher": "sums", "task_kwargs": few, "max_new_tokens": 6, "task_reward": 0.5} | kwargs


def one_state(probabilities: list[float]) -> TabularModel:
    v = len(probabilities)
    return TabularModel(suffix_automaton(v, 0), torch.tensor([probabilities], dtype=torch.float64).log(), v - 1)


def random_actions(env: DistillVectorEnv, rng: np.random.Generator, n: int, rewrites: float = 0.3) -> NDArray[np.int64]:
    """Tokens and REWRITEs [n]."""
    rewrite = env.rewrite_action
    return np.where(rng.random(n) < rewrites, rewrite, rng.integers(0, rewrite, n))


def assert_equal(actual: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Of observations, rewards, flags and infos, however nested; floats to within `tolerance`, all else exactly."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_equal(actual[key], expected[key], tolerance)
    elif isinstance(expected, tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other, tolerance)
    elif isinstance(expected, np.ndarray) and expected.dtype == object:
        assert actual.shape == expected.shape
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other, tolerance)
    elif isinstance(expected, np.ndarray):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        if tolerance and np.issubdtype(expected.dtype, np.floating):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
        else:
            np.testing.assert_array_equal(actual, expected)
    else:
        assert type(actual) is type(expected)
        assert actual == pytest.approx(expected, abs=tolerance) if tolerance else actual == expected


# ---------------------------------------------------------------------- what Gymnasium and Stable-Baselines3 ask for


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
    command = [
        sys.executable,
        str(script),
        "--env-id",
        "distill_env:Distill/Categorical-v0",
        "--total-timesteps",
        "2048",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
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


# ---------------------------------------------------------------------- one batch is many single environments


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("span", ["token", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_equals_single_environments_step_by_step(kind: Kind, span: str, mode: str) -> None:
    n, tolerance = 4, TOLERANCE[kind]
    arguments = arguments_of(kind, rewrite_span=span)
    batch = DistillVectorEnv(n, **arguments, autoreset_mode=mode)
    singles = SyncVectorEnv([lambda: DistillEnv(**arguments)] * n, autoreset_mode=mode)
    rng = np.random.default_rng(0)
    assert_equal(batch.reset(seed=3), singles.reset(seed=3), tolerance)
    ended = 0
    for _ in range(16 if kind == "language model" else 40):
        actions = random_actions(batch, rng, n)
        ours, theirs = batch.step(actions), singles.step(actions)
        assert_equal(ours, theirs, tolerance)
        done = ours[2] | ours[3]
        ended += int(done.sum())
        if mode == "Disabled" and done.any():
            mask = {"reset_mask": done}
            assert_equal(batch.reset(options=mask), singles.reset(options=dict(mask)), tolerance)
            assert mask["reset_mask"] is done  # the caller's dictionary is left alone
    assert ended > n


def test_same_seed_same_episode() -> None:
    """And another seed another one; without a seed the stream of episodes goes on."""

    def play(env: gym.Env[Any, Any], seed: int | None, episodes: int = 3) -> list[Any]:
        seen: list[Any] = []
        for episode in range(episodes):
            seen.append(env.reset(seed=seed if episode == 0 else None)[0].tolist())
            done = False
            while not done:
                observation, reward, terminated, truncated, _ = env.step(REWRITE)
                seen.append((observation.tolist(), reward))
                done = terminated or truncated
        return seen

    first, second = gym.make("Distill/Categorical-v0"), gym.make("Distill/Categorical-v0")
    assert play(first, 1) == play(second, 1) == play(first, 1)
    assert play(first, 1) != play(second, 2)
    one, two = play(first, None, 20), play(second, None, 20)  # both go on where they were
    assert one != two


# ---------------------------------------------------------------------- copies


def played_for_a_while(kind: Kind, **kwargs: Any) -> DistillVectorEnv:
    """An environment in mid-episode, some rows further than others, and some at an end."""
    env = DistillVectorEnv(4, **arguments_of(kind, **kwargs))
    env.reset(seed=0)
    rng = np.random.default_rng(1)
    for _ in range(3):
        step_somehow(env, rng)
    return env


def step_somehow(env: DistillVectorEnv, rng: np.random.Generator) -> Any:
    """Random actions; rows that wait for a reset go on waiting."""
    actions = random_actions(env, rng, env.num_envs)
    if env.autoreset_mode is AutoresetMode.DISABLED:
        actions[ended(env)] = PAD
    return env.step(actions)


def ended(env: DistillVectorEnv) -> NDArray[np.bool_]:
    """Rows that wait for a reset."""
    return env._ended.copy()


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_on_as_the_original_does(kind: Kind, mode: str, how: str) -> None:
    env = played_for_a_while(kind, autoreset_mode=mode)
    copied = pickle.loads(pickle.dumps(env)) if how == "pickle" else copy.deepcopy(env)
    rngs = np.random.default_rng(2), np.random.default_rng(2)
    for step in range(10):
        if mode == "Disabled" and step == 5:
            options = {"reset_mask": ended(env)}
            assert options["reset_mask"].any()
            assert_equal(copied.reset(options=options), env.reset(options=options), TOLERANCE[kind])
        assert_equal(step_somehow(copied, rngs[0]), step_somehow(env, rngs[1]), TOLERANCE[kind])


def test_copies_of_single_chunked_and_live_environments() -> None:
    """Wrapped by `make`; with a chunk; and with a teacher that was handed over as an object."""
    single = gym.make("Distill/Categorical-v0", rewrite_cost=0.5)
    single.reset(seed=0)
    single.step(REWRITE)
    copied = pickle.loads(pickle.dumps(single))
    for action in (REWRITE, 0, 1):
        assert_equal(copied.step(action), single.step(action))
    chunked = DistillVectorEnv(3, Ragged(V, 6), markov(V, 2), chunk=3)
    chunked.reset(seed=0)
    actions = np.array([[0, 1, REWRITE], [2, REWRITE, 0], [1, 1, 1]])
    chunked.step(actions)
    copied = pickle.loads(pickle.dumps(chunked))
    for _ in range(4):
        assert_equal(copied.step(actions), chunked.step(actions))


def test_a_copy_is_small() -> None:
    """By name and state: no weights and no cache go into a pickle."""
    assert len(pickle.dumps(played_for_a_while("language model"))) < 20_000


def test_environments_on_one_live_teacher_do_not_disturb_each_other() -> None:
    teacher = markov(V, 2)
    one, other = (DistillVectorEnv(2, "categorical", teacher) for _ in range(2))
    alone = DistillVectorEnv(2, "categorical", markov(V, 2))
    one.reset(seed=0)
    alone.reset(seed=0)
    other.reset(seed=1)
    for action in ([0, 1], [REWRITE, 2], [3, 3]):
        other.step(np.array([4, 4]))
        assert_equal(one.step(np.array(action)), alone.step(np.array(action)))


# ---------------------------------------------------------------------- looking ahead


def random_draft(rng: np.random.Generator, room: NDArray[np.int64], width: int, eos: int) -> Tensor:
    """Tokens [n, K], ragged with -1, at most `room` in a row; the end token, the last id, is not among them."""
    tokens = rng.integers(0, eos, (len(room), width))
    lengths = np.minimum(room, rng.integers(0, width + 1, len(room)))
    tokens[np.arange(width) >= lengths[:, None]] = PAD
    return torch.from_numpy(tokens)


@pytest.mark.parametrize("span", ["token", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_looking_ahead_changes_nothing_and_shows_what_stepping_does(kind: Kind, span: str) -> None:
    """With ragged drafts, before and after rewrites and ends; followed afterwards wholly, in part or not at all."""
    n, k, tolerance = 4, 3, max(TOLERANCE[kind], 1e-6)  # info is float32
    arguments = arguments_of(kind, rewrite_span=span, max_new_tokens=8, autoreset_mode="Disabled")
    looking, plain = (DistillVectorEnv(n, **arguments, chunk=k) for _ in range(2))
    stepping = DistillVectorEnv(n, **arguments)  # shows the teacher after every token
    now = np.zeros((n, looking.vocab_size), np.float32)  # the teacher at the present states
    rng = np.random.default_rng(0)
    environments = (looking, plain, stepping)
    for env in environments:
        remember(now, env.reset(seed=4)[1])
    for _ in range(10):
        live = ~ended(looking)
        for width in (0, 2, k):
            room = np.where(live, looking.max_new_tokens - 1 - looking._lengths, 0)
            draft = random_draft(rng, room, width, looking.task.eos_token_id)
            log_probs = looking.lookahead(draft)
            assert log_probs.shape == (n, width + 1, looking.vocab_size)
            np.testing.assert_allclose(log_probs[live, 0], now[live], rtol=0, atol=tolerance)
            walking, there = copy.deepcopy(stepping), now.copy()
            for j, column in enumerate(draft.numpy().T):
                remember(there, walking.step(column)[4])
                read = column != PAD
                np.testing.assert_allclose(log_probs[read, j + 1], there[read], rtol=0, atol=tolerance)
        actions = draft.numpy().copy()  # followed up to a rewrite, another token, or nothing more
        column = rng.integers(0, k, n)
        actions[np.arange(n), column] = rng.choice([looking.rewrite_action, 0, PAD], n)
        actions[~live] = PAD
        if rng.random() < 0.5 and not live.all():
            for env in environments:
                remember(now, env.reset(options={"reset_mask": ~live})[1])
        assert_equal(looking.step(actions), plain.step(actions), TOLERANCE[kind])
        for result in single_steps(stepping, actions):
            remember(now, result[4])


def remember(now: NDArray[np.float32], info: dict[str, Any]) -> None:
    """Take the teacher at the present states [n, V] from an info, as far as it shows it."""
    if "teacher_log_probs" in info:
        known = info["_teacher_log_probs"]
        now[known] = info["teacher_log_probs"][known]


def test_a_draft_may_be_written_over_after_looking() -> None:
    """The environment has its own copy of it."""
    env = DistillVectorEnv(1, "categorical", "markov", teacher_kwargs={"vocab_size": V}, chunk=2)
    other = DistillVectorEnv(1, "categorical", "markov", teacher_kwargs={"vocab_size": V}, chunk=2)
    env.reset(seed=0)
    other.reset(seed=0)
    draft = torch.tensor([[0, 1]])
    env.lookahead(draft)
    draft[:] = torch.tensor([[3, 2]])
    assert_equal(env.step(np.array([[3, 2]])), other.step(np.array([[3, 2]])))


def single_steps(env: DistillVectorEnv, actions: NDArray[np.int64]) -> list[Any]:
    """A chunk [n, K] one column at a time: a row stops at padding, after a REWRITE, and at its end."""
    going = np.ones(len(actions), np.bool_)
    results = []
    for column in actions.T:
        going = going & (column != PAD) & ~ended(env)
        results.append(env.step(np.where(going, column, PAD)))
        going = going & (column != env.rewrite_action)
    return results


@pytest.mark.parametrize("span", ["token", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_equals_its_steps_one_by_one(kind: Kind, span: str) -> None:
    n, k, tolerance = 5, 4, TOLERANCE[kind]
    arguments = arguments_of(kind, rewrite_span=span, autoreset_mode="Disabled")
    chunked, single = DistillVectorEnv(n, **arguments, chunk=k), DistillVectorEnv(n, **arguments)
    rng = np.random.default_rng(0)
    chunked.reset(seed=0)
    single.reset(seed=0)
    ends = 0
    for _ in range(20):
        width = int(rng.integers(1, k + 1))  # fewer columns than K are accepted
        actions = random_actions(chunked, rng, n * width, 0.15).reshape(n, width)
        actions[rng.random((n, width)) < 0.1] = PAD
        actions[ended(chunked)] = PAD
        observation, reward, terminated, truncated, info = chunked.step(actions)
        results = single_steps(single, actions)
        np.testing.assert_array_equal(observation, results[-1][0])
        np.testing.assert_allclose(reward, sum(r[1] for r in results), rtol=0, atol=max(tolerance, 1e-9))
        np.testing.assert_array_equal(terminated, np.any([r[2] for r in results], 0))
        np.testing.assert_array_equal(truncated, np.any([r[3] for r in results], 0))
        for row in np.flatnonzero(info.get("_tokens", False)):
            parts = [r[4] for r in results if "tokens" in r[4] and r[4]["_tokens"][row]]
            written = info["tokens"][row] >= 0
            for key in ("tokens", "rewritten", "token_rewards"):
                expected = [value for p in parts for value in p[key][row][p["tokens"][row] >= 0]]
                np.testing.assert_allclose(info[key][row][written], expected, rtol=0, atol=tolerance)
            assert not info["token_rewards"][row][~written].any()
            assert info["floored"][row] == sum(p["floored"][row] for p in parts)
        ends += int((terminated | truncated).sum())
        if ended(chunked).sum() > 2:
            mask = {"reset_mask": ended(chunked)}
            chunked.reset(options=mask)
            single.reset(options=mask)
    assert ends > 2 * n


@pytest.mark.parametrize("span", ["token", "step"])
def test_the_teacher_is_asked_once_for_each_state(span: str) -> None:
    """A step along a look-ahead costs no pass; nor does a rewritten token, which is read with the next look."""
    teacher = one_state([0.0, 0.3, 0.3, 0.4, 0.0])  # neither ends a step (0) nor the answer (4)
    env = DistillVectorEnv(2, CategoricalTask(5, 6), teacher, rewrite_span=span, chunk=4)  # type: ignore[arg-type]
    env.reset(seed=0)
    use = env.teacher_usage
    assert (use.passes, use.positions, use.tokens) == (1, 2, 0)
    env.lookahead(torch.tensor([[1, 1, 2], [3, 2, PAD]]))
    assert (use.passes, use.positions) == (2, 2 + 5)
    env.step(np.array([[1, 1, 2], [3, PAD, PAD]]))
    env.lookahead(torch.full((2, 2), PAD))
    assert (use.passes, use.positions) == (2, 7)  # all of it was known
    env.step(np.array([[REWRITE - 1], [PAD]]))
    told = list(env.executed_log_probs())
    rows, positions = (np.concatenate([piece[i] for piece in told]) for i in (0, 1))
    if span == "token":
        assert (use.passes, use.positions, use.tokens) == (2, 7, 1)
        env.lookahead(torch.tensor([[1], [1]]))
        assert (use.passes, use.positions) == (3, 7 + 2 + 1)  # the rewritten one and two drafted
        assert (rows.tolist(), positions.tolist()) == ([0], [3])
    else:  # three tokens, up to the horizon, of which it has to read two
        assert (use.passes, use.positions, use.tokens) == (4, 9, 3)
        assert (rows.tolist(), positions.tolist()) == ([0] * 3, [3, 4, 5])
    for *_, log_probs in told:
        torch.testing.assert_close(log_probs, teacher.log_table().expand_as(log_probs))


def test_what_was_executed_is_told_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same states and distributions, at most so many numbers at a time."""
    env = DistillVectorEnv(3, CategoricalTask(5, 6), markov(5), chunk=4, reveal_teacher=False)  # type: ignore[arg-type]
    env.reset(seed=0)
    env.step(np.array([[1, 2, 0, 5], [3, 5, PAD, PAD], [0, 0, 0, 0]]))
    ((rows, positions, log_probs), (written, at, drawn)) = env.executed_log_probs()
    assert (written.tolist(), at.tolist(), len(drawn)) == ([0, 1], [3, 1], 2)
    monkeypatch.setattr("distill_env.env._PIECE", 3 * 5)
    pieces = list(env.executed_log_probs())
    assert [len(piece) for *_, piece in pieces] == [3, 3, 2, 2]
    assert np.concatenate([row for row, _, _ in pieces]).tolist() == [*rows.tolist(), *written.tolist()]
    assert np.concatenate([position for _, position, _ in pieces]).tolist() == [*positions.tolist(), *at.tolist()]
    assert torch.cat([piece for *_, piece in pieces]).equal(torch.cat([log_probs, drawn]))


def test_stepping_costs_a_pass_a_step() -> None:
    env = DistillVectorEnv(3, **arguments_of("table"), autoreset_mode="Disabled", reveal_teacher=True)
    env.reset(seed=0)
    for passes in (2, 3, 4):
        env.step(np.array([0, 1, 2]))
        assert env.teacher_usage.passes == passes
    hidden = DistillVectorEnv(3, **arguments_of("table"), reveal_teacher=False)
    _, info = hidden.reset(seed=0)
    assert "teacher_log_probs" not in info
    hidden.step(np.array([0, 1, 2]))
    assert hidden.teacher_usage.passes == 1  # the first distribution came with the prompt


# ---------------------------------------------------------------------- rewards


def one_state_env(probabilities: list[float], n: int = 1, max_new_tokens: int = 4, **kwargs: Any) -> DistillVectorEnv:
    """No prompt, and the same distribution everywhere."""
    task = CategoricalTask(len(probabilities), max_new_tokens, empty_prompt=True)
    return DistillVectorEnv(n, task, one_state(probabilities), autoreset_mode="Disabled", **kwargs)


def test_an_own_token_pays_the_teachers_log_probability_and_a_rewrite_its_price() -> None:
    env = one_state_env([0.5, 0.3, 0.2], rewrite_cost=0.75)
    _, info = env.reset(seed=0)
    np.testing.assert_allclose(np.exp(info["teacher_log_probs"][0]), [0.5, 0.3, 0.2], atol=1e-7)
    assert env.step(np.array([1]))[1] == pytest.approx(np.log(0.3))
    _, reward, _, _, info = env.step(np.array([3]))
    assert reward == -0.75
    assert info["rewritten"].tolist() == [[True]]
    assert info["tokens"][0, 0] in range(3)


def test_rewards_are_floored_and_the_floor_counted() -> None:
    env = one_state_env([0.9, 0.1 - 1e-9, 1e-9, 0.0], 4, log_prob_floor=-10.0, chunk=3)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.array([[0, 0, 1], [2, 0, 2], [0, 3, PAD], [4, PAD, PAD]]))
    assert info["floored"].tolist() == [0, 2, 1, 0]
    expected = [2 * np.log(0.9) + np.log(0.1), -20 + np.log(0.9), np.log(0.9) - 10, -1.0]
    np.testing.assert_allclose(reward, expected, atol=1e-6)
    np.testing.assert_allclose(info["token_rewards"].sum(1), reward)


def test_a_whole_step_is_written_at_one_price() -> None:
    """Up to and including the token that ends it, the end token, or the horizon."""
    env = one_state_env([0.15, 0.7, 0.15], 300, rewrite_span="step", rewrite_cost=2.0, max_new_tokens=5)  # `a` ends it
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(np.full(300, 3))
    assert set(reward.tolist()) == {-2.0}
    for row, tokens in enumerate(info["tokens"].tolist()):
        written = [t for t in tokens if t >= 0]
        assert all(t == 1 for t in written[:-1])
        assert written[-1] in (0, 2) or len(written) == 5
        assert terminated[row] == (written[-1] == 2)
        assert truncated[row] == (len(written) == 5 and written[-1] != 2)
    assert terminated.any()
    assert truncated.any()
    assert not (terminated | truncated).all()


def test_the_task_pays_at_the_end() -> None:
    """`task_reward` times the grade, whoever wrote, once, on top of the rest."""
    prompt = Prompt(SumsTask.encode_problem(([7, 2], None)), "7+2=")
    for answer, grade in (
        ([2, 9], 0.0),
        (SumsTask.encode_completion([2, 7]), 1.0),
        (SumsTask.encode_completion([7, 2])[:-1], 0.0),
    ):
        plain, paid = (DistillVectorEnv(1, "sums", "sums", task_reward=w, max_new_tokens=6) for w in (0.0, 5.0))
        for env in (plain, paid):
            env.reset(options={"prompts": [prompt]})
        actions = [*answer, *[0] * (6 - len(answer))] if len(answer) < 6 else answer
        difference = 0.0
        for i, token in enumerate(actions):
            before = plain.step(np.array([token]))[1]
            _, after, terminated, truncated, info = paid.step(np.array([token]))
            difference += float(after[0] - before[0])
            assert ("grade" in info) == bool((terminated | truncated)[0]) == (i == len(actions) - 1)
        assert difference == pytest.approx(5.0 * grade)
        assert info["grade"][0] == grade


# ---------------------------------------------------------------------- the teacher's pen


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"rewrite": "sample"}, [0.1, 0.4, 0.3, 0.15, 0.05]),
        ({"rewrite": "argmax"}, [0, 1, 0, 0, 0]),
        ({"rewrite": "nucleus", "rewrite_top_p": 0.69}, [0, 4 / 7, 3 / 7, 0, 0]),
        ({"rewrite": "nucleus", "rewrite_top_p": 0.71}, [0, 40 / 85, 30 / 85, 15 / 85, 0]),
        ({"rewrite": "nucleus", "rewrite_top_p": 1.0}, [0.1, 0.4, 0.3, 0.15, 0.05]),
    ],
)
def test_how_the_teacher_draws(arguments: dict[str, Any], expected: list[float]) -> None:
    n = 20_000
    env = one_state_env([0.1, 0.4, 0.3, 0.15, 0.05], n, reveal_teacher=False, **arguments)
    env.reset(seed=0)
    info = env.step(np.full(n, 5))[4]
    frequencies = np.bincount(info["tokens"][:, 0], minlength=5) / n
    np.testing.assert_allclose(frequencies, expected, atol=0.012)
    assert not frequencies[np.array(expected) == 0].any()


def test_a_draw_depends_on_episode_and_position_alone() -> None:
    """Not on the row, on who shares the batch, or on what was drafted and dropped before."""
    arguments = arguments_of("table", autoreset_mode="Disabled")
    keys, prompts = episode_keys(9, np.arange(3)), [Prompt((i,), "") for i in range(3)]
    env = DistillVectorEnv(3, **arguments)
    env.reset(options={"episode_keys": keys, "prompts": prompts})
    expected = [env.step(np.full(3, REWRITE))[4]["tokens"][:, 0] for _ in range(2)]
    order = [2, 0]
    fewer = DistillVectorEnv(2, **arguments)
    fewer.reset(options={"episode_keys": keys[order], "prompts": [prompts[i] for i in order]})
    for tokens in expected:
        fewer.lookahead(torch.tensor([[0, 1], [1, PAD]]))
        np.testing.assert_array_equal(fewer.step(np.full(2, REWRITE))[4]["tokens"][:, 0], tokens[order])


# ---------------------------------------------------------------------- gates in front of it


@pytest.mark.parametrize(
    ("limits", "rewritten"),
    [
        ({"top_k": 1}, [False, True, True, True, True]),
        ({"top_k": 2}, [False, False, True, True, True]),
        ({"top_k": 3}, [False, False, False, True, True]),
        ({"min_log_prob": np.log(0.1)}, [False, False, False, True, True]),
        ({"top_k": 2, "min_log_prob": np.log(0.4)}, [False, True, True, True, True]),
        ({}, [False, False, False, False, True]),
    ],
)
def test_what_the_teacher_finds_implausible_is_handed_over(limits: dict[str, Any], rewritten: list[bool]) -> None:
    """Tokens outside its `top_k` or below `min_log_prob`; a REWRITE stays one."""
    env = RewriteImplausible(one_state_env([0.45, 0.3, 0.2, 0.05], 5, rewrite_cost=0.6), **limits)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.arange(5))
    assert info["rewritten"][:, 0].tolist() == rewritten
    paid = np.append(np.log([0.45, 0.3, 0.2, 0.05]), -0.6)
    np.testing.assert_allclose(reward, np.where(rewritten, -0.6, paid))


def test_padding_is_not_handed_over() -> None:
    """Though the first token, whose place it takes in a look-up, would be."""
    env = RewriteImplausible(one_state_env([0.05, 0.45, 0.3, 0.2], 2), top_k=1)
    env.reset(seed=0)
    info = env.step(np.array([PAD, 1]))[4]
    assert info["tokens"].tolist() == [[PAD], [1]]
    assert not info["rewritten"].any()


@pytest.mark.parametrize("mode", MODES)
def test_the_gated_batch_equals_gated_single_environments(mode: str) -> None:
    """It looks at the teacher where the tokens will be written: across ends, resets and masked resets."""
    arguments = arguments_of("ragged table")
    batch = RewriteImplausible(DistillVectorEnv(4, **arguments, autoreset_mode=mode), top_k=2)
    singles = SyncVectorEnv(
        [lambda: SingleRewriteImplausible(DistillEnv(**arguments), top_k=2)] * 4, autoreset_mode=mode
    )
    rng = np.random.default_rng(0)
    assert_equal(batch.reset(seed=0), singles.reset(seed=0))
    written = Counter[bool]()
    for _ in range(40):
        actions = random_actions(batch.unwrapped, rng, 4, rewrites=0.0)  # type: ignore[arg-type]
        ours, theirs = batch.step(actions), singles.step(actions)
        assert_equal(ours, theirs)
        done = ours[2] | ours[3]
        for info in (ours[4], ours[4].get("final_info", {})):
            written.update(info.get("rewritten", np.zeros((0, 1)))[info.get("_rewritten", [])][:, 0].tolist())
        if mode == "Disabled" and done.any():
            mask = {"reset_mask": done}
            assert_equal(batch.reset(options=mask), singles.reset(options=dict(mask)))
    assert 0.5 < written[True] / written.total() < 0.85  # two of six tokens stand


def test_a_gate_needs_to_see_the_teacher() -> None:
    for hides in ({"chunk": 2}, {"reveal_teacher": False}):
        env = RewriteImplausible(DistillVectorEnv(2, **arguments_of("table"), **hides), top_k=2)
        with pytest.raises(ValueError, match="env: its info does not show the teacher; make it with chunk=1 and"):
            env.reset()
    with pytest.raises(ValueError, match="top_k: -1 is negative"):
        RewriteImplausible(DistillVectorEnv(2, **arguments_of("table")), top_k=-1)
    with pytest.raises(gym.error.ResetNeeded):
        RewriteImplausible(DistillVectorEnv(2, **arguments_of("table")), top_k=1).step(np.array([0, 1]))
    wrapped = SingleRewriteImplausible(gym.make("Distill/Categorical-v0"), top_k=2)
    assert wrapped.spec is not None
    assert isinstance(gym.make(EnvSpec.from_json(wrapped.spec.to_json())), SingleRewriteImplausible)


# ---------------------------------------------------------------------- resets


def test_prompts_and_keys_are_chosen_at_reset() -> None:
    env = DistillVectorEnv(3, **arguments_of("table"), autoreset_mode="Disabled")
    observation, info = env.reset(options={"prompts": [(0,), Prompt((3,), "d"), np.array([4])]})
    assert observation[:, :2].tolist() == [[0, PAD], [3, PAD], [4, PAD]]
    table = env.teacher.log_table()  # type: ignore[attr-defined]
    states = [env.teacher.walk((i,)) for i in (0, 3, 4)]  # type: ignore[attr-defined]
    np.testing.assert_allclose(info["teacher_log_probs"], table[states].detach().float(), atol=1e-7)
    keys = np.array([5, 6, 5], np.uint64)
    env.reset(options={"prompts": [(0,)] * 3, "episode_keys": keys})
    tokens = np.stack([env.step(np.full(3, REWRITE))[4]["tokens"][:, 0] for _ in range(2)], 1)
    assert tokens[0].tolist() == tokens[2].tolist()


def test_a_masked_reset_leaves_the_other_rows_alone() -> None:
    arguments = arguments_of("language model", autoreset_mode="Disabled")
    some, none = DistillVectorEnv(3, **arguments), DistillVectorEnv(3, **arguments)
    some.reset(seed=0)
    none.reset(seed=0)
    actions = np.array([7, some.rewrite_action, 3])
    some.step(actions)
    before = none.step(actions)[0]
    options = {"reset_mask": np.array([False, True, False]), "prompts": [SumsTask.encode_problem(([1, 2], None))]}
    observation, info = some.reset(options=options)
    assert info["_teacher_log_probs"].tolist() == [False, True, False]
    np.testing.assert_array_equal(observation[[0, 2]], before[[0, 2]])
    assert observation[1, :5].tolist() == [*SumsTask.encode_problem(([1, 2], None)), PAD]
    assert set(options) == {"reset_mask", "prompts"}
    after, expected = some.step(actions), none.step(actions)
    for one, other in zip(after[:4], expected[:4], strict=True):
        assert_equal(one[[0, 2]], other[[0, 2]], 1e-4)


def test_prompts_are_drawn_evenly_from_the_split() -> None:
    env = DistillVectorEnv(5000, **arguments_of("table", reveal_teacher=False))
    observation, _ = env.reset(seed=0)
    frequencies = np.bincount(observation[:, 0], minlength=5) / 5000
    np.testing.assert_allclose(frequencies, 0.2, atol=0.02)


def test_every_autoreset_begins_another_episode() -> None:
    env = DistillVectorEnv(2, **arguments_of("table"), autoreset_mode="SameStep")
    env.reset(seed=0)
    begun = Counter[int]()
    for _ in range(40):
        observation, _, terminated, _, info = env.step(np.full(2, V - 1))  # ends at once
        assert terminated.all()
        assert info["final_obs"][0][1] == V - 1
        begun.update(observation[:, 0].tolist())
    assert len(begun) == 5


def test_an_ended_row_waits() -> None:
    """Without autoreset it takes only -1, for which nothing happens."""
    env = DistillVectorEnv(2, **arguments_of("table"), autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(np.array([V - 1, 0]))
    with pytest.raises(gym.error.ResetNeeded, match=r"rows \[0\] have ended"):
        env.step(np.array([0, 0]))
    observation, reward, terminated, truncated, info = env.step(np.array([PAD, 0]))
    assert (reward[0], terminated[0], truncated[0]) == (0.0, False, False)
    assert info["_tokens"].tolist() == [False, True]
    assert (observation[0] >= 0).sum() == 2


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    """Chat templates close every message with it."""
    env = DistillVectorEnv(2, **arguments_of("table"), autoreset_mode="Disabled")
    env.reset(options={"prompts": [(V - 1,), (0,)]})
    assert not env.step(np.array([PAD, V - 1]))[2][0]
    _, reward, terminated, _, _ = env.step(np.array([0, PAD]))
    assert reward[0] < 0
    assert not terminated.any()


# ---------------------------------------------------------------------- rendering


def test_ansi_shows_who_wrote() -> None:
    """The prompt dim, what the teacher wrote red, the rest plain."""
    env = one_state_env([0.0, 1.0 - 1e-12, 1e-12], render_mode="ansi", max_new_tokens=5)
    env.reset(seed=0, options={"prompts": [()]})
    for action in (0, 3, 3, 0):
        env.step(np.array([action]))
    assert env.render() == ("\x1b[2m\x1b[0ma\x1b[31mbb\x1b[0ma",)
    single = gym.make("Distill/Sums-v0", render_mode="ansi")
    single.reset(options={"prompts": [SumsTask.encode_problem(([7, 2], None))]})
    for action in (7, 7, 12):
        single.step(action)
    assert single.render() == "\x1b[2m7+2=\x1b[0m77;"
    assert DistillVectorEnv(1, **arguments_of("table")).render() is None


# ---------------------------------------------------------------------- the user's mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "poetry"}, "task: unknown task 'poetry'; accepted: categorical, sums, coins, instruct, gsm8k, math"),
        ({"split": "dev"}, "split: 'dev'; accepted: train, validation, test, ood"),
        ({"task": "sums"}, "teacher: 'markov' has 6 token ids, the task has 14; they have to share one vocabulary"),
        ({"rewrite": "beam"}, "rewrite: 'beam'; accepted: sample, nucleus, argmax"),
        ({"rewrite_span": "line"}, "rewrite_span: 'line'; accepted: token, step"),
        ({"rewrite_top_p": 0.0}, r"rewrite_top_p: 0.0 is not in \(0, 1\]"),
        ({"rewrite_cost": -0.1}, "rewrite_cost: -0.1 is not a price; accepted: at least 0 nats"),
        ({"rewrite_cost": float("nan")}, "rewrite_cost: nan"),
        ({"log_prob_floor": 0.0}, "log_prob_floor: 0.0 is not below 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is not at least 1"),
        ({"chunk": 0}, "chunk and num_envs: 0 and 2; both have to be at least 1"),
        ({"render_mode": "human"}, "render_mode: 'human'; accepted: ansi"),
        ({"autoreset_mode": "Later"}, "autoreset_mode: 'Later'; accepted: NextStep, SameStep, Disabled"),
        ({"task": "instruct", "teacher": "sums", "split": "ood"}, "split: the task has no prompts in 'ood'"),
        (
            {"task": "sums", "teacher": "sums", "max_new_tokens": 60, "teacher_kwargs": None},
            "max_new_tokens: a prompt of 14 tokens and 60 new ones do not fit into the teacher's context of 64",
        ),
        (
            {"task": "instruct", "teacher": "sums", "task_kwargs": {"path": "nowhere.txt"}},
            "task_path: 'nowhere.txt' is not there; accepted: a file",
        ),
    ],
)
def test_a_bad_argument_is_named_in_one_line(arguments: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {"task": "categorical", "teacher": "markov", "teacher_kwargs": {"vocab_size": V}}
    arguments = defaults | arguments
    if arguments["teacher"] == "sums":
        arguments["teacher_kwargs"] = None
    with pytest.raises(ValueError, match=message) as error:
        DistillVectorEnv(2, **arguments)
    assert "\n" not in str(error.value)


def test_a_teacher_that_is_not_there() -> None:
    with pytest.raises(OSError, match=r"no causal language model can be loaded from './nowhere'") as error:
        DistillVectorEnv(2, "sums", "./nowhere")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [(0,)]}, "prompts: 1 for 2 rows that are reset"),
        ({"prompts": [(0,), (V,)]}, r"prompts: a token id outside \[0, 5\]"),
        ({"prompts": [(0,), (0, 1)]}, "prompts: a prompt of 2 tokens; at most 1 fit the observation"),
        ({"episode_keys": np.zeros(3, np.uint64)}, "episode_keys: 3 for 2 rows that are reset"),
        ({"reset_mask": np.zeros(2, np.bool_)}, r"reset_mask: a bool array of shape \(2,\) with a true value"),
        ({"reset_mask": np.ones(3, np.bool_)}, r"reset_mask: a bool array of shape \(2,\) with a true value"),
        ({"reset_mask": np.ones(2)}, r"reset_mask: a bool array of shape \(2,\) with a true value"),
    ],
)
def test_a_bad_reset_is_refused_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    env, untouched = (DistillVectorEnv(2, **arguments_of("table")) for _ in range(2))
    env.reset(seed=0)
    untouched.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)
    for action in (0, REWRITE, V - 1, 0, 0):
        assert_equal(env.step(np.full(2, action)), untouched.step(np.full(2, action)))
    assert_equal(env.reset(), untouched.reset())


def test_a_bad_step_is_refused_and_changes_nothing() -> None:
    env, untouched = (DistillVectorEnv(2, **arguments_of("table"), chunk=2) for _ in range(2))
    for call in (lambda: env.step(np.zeros((2, 2), np.int64)), lambda: env.lookahead(torch.zeros(2, 1).long())):
        with pytest.raises(gym.error.ResetNeeded, match="call reset before"):
            call()
    env.reset(seed=0)
    untouched.reset(seed=0)
    for actions, message in (
        (np.zeros((2, 3)), r"actions: shape \(2, 3\); accepted: \(2, k\) with 1 <= k <= chunk = 2"),
        (np.zeros(2), r"actions: shape \(2,\)"),
        (np.zeros((3, 1)), r"actions: shape \(3, 1\)"),
        (np.full((2, 1), V + 1), r"actions: outside \[-1, 6\]"),
        (np.full((2, 1), -2), r"actions: outside \[-1, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            env.step(actions)
    for draft in (torch.zeros(3, 1).long(), torch.full((2, 1), V)):
        with pytest.raises(ValueError, match=r"tokens: accepted: \[2, K\], ids below 6, padded with -1"):
            env.lookahead(draft)
    assert_equal(env.step(np.array([[0, 1], [2, REWRITE]])), untouched.step(np.array([[0, 1], [2, REWRITE]])))
    with pytest.raises(ValueError, match="reset_mask: the first reset has to be of all rows"):
        DistillVectorEnv(2, **arguments_of("table")).reset(options={"reset_mask": np.array([True, False])})


def test_the_shipped_teacher_writes_right_chains_through_the_environment() -> None:
    """At least 98 % at temperature 1 on held-out problems of every number of digits."""
    n = 300
    task = SumsTask()
    for prompts in (task.prompts("test"), task.prompts("ood")):
        for length in sorted({p.difficulty for p in prompts}):
            chosen = [p for p in prompts if p.difficulty == length]
            chosen = [chosen[i % len(chosen)] for i in range(n)]
            env = DistillVectorEnv(n, "sums", "sums", split="test", autoreset_mode="Disabled", reveal_teacher=False)
            env.reset(seed=length, options={"prompts": chosen})
            grades = np.zeros(n)
            while not ended(env).all():
                info = env.step(np.where(ended(env), PAD, env.rewrite_action))[4]
                if "grade" in info:
                    grades[info["_grade"]] = info["grade"][info["_grade"]]
            assert grades.mean() >= 0.98, f"{length} digits: {grades.mean():.3f}"


def test_a_fresh_language_model_serves_as_a_live_teacher() -> None:
    torch.manual_seed(0)
    env = DistillVectorEnv(2, "sums", CausalLM(small_teacher("sums", 16, 1)), autoreset_mode="Disabled")
    env.reset(seed=0)
    assert env.step(np.array([3, env.rewrite_action]))[0].shape == env.observation_space.shape
    assert load_model("sums").vocab_size == env.vocab_size


def test_the_defaults_fit_together() -> None:
    """No argument at all makes an environment that runs."""
    env = DistillVectorEnv()
    _, info = env.reset(seed=0)
    assert info["teacher_log_probs"].shape == (1, 6)
