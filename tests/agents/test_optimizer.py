"""The optimiser: the learning rate by hand, decay of matrices alone, masters that sum what bfloat16 would lose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.methods import METHODS
from agents.optimizer import MasterAdamW, learning_rate
from distill_env.env import DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.models.toy import toy_student


def test_the_learning_rate_by_hand() -> None:
    """It rises linearly, then falls to a hundredth, linearly or by half a cosine, and stays there."""
    config = OptimizerConfig(learning_rate=2.0, warmup_iterations=3, decay_iterations=0)
    assert [learning_rate(config, i) for i in (0, 1, 2, 3, 9999)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert learning_rate(replace(config, schedule="constant"), 9999) == 2.0
    linear = replace(config, decay_iterations=100)
    assert [learning_rate(linear, i) for i in (0, 50, 75, 100, 200)] == [0.5, 1.0, 0.5, 0.02, 0.02]
    cosine = replace(linear, schedule="cosine")
    # at half time the mean of both ends, at a third three quarters of the way up between them
    expected = {0: 0.5, 25: 2 * (0.01 + 0.99 * (1 + 0.5**0.5) / 2), 50: 1.01, 100: 0.02, 200: 0.02}
    for i, value in expected.items():
        assert learning_rate(cosine, i) == pytest.approx(value, rel=1e-12)
    falling = [learning_rate(cosine, i) for i in range(5, 101)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"schedule": "exponential"}, "schedule"),
        ({"schedule": "constant", "decay_iterations": 5}, "decay_iterations"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"adam_beta2": 1.0}, "adam_beta2"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        OptimizerConfig(**arguments)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_without_a_length_is_refused(schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"^decay_iterations:"):
        learning_rate(OptimizerConfig(schedule=schedule), 0)


def test_only_matrices_decay() -> None:
    """Without gradient in the past or present a matrix shrinks by the step size times the decay; a bias stays."""
    matrix, bias = nn.Parameter(torch.full((2, 2), 8.0)), nn.Parameter(torch.full((2,), 8.0))
    optimizer = MasterAdamW([bias, matrix], OptimizerConfig(learning_rate=0.5, weight_decay=0.25))
    for parameter in (matrix, bias):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert matrix.tolist() == [[7.0, 7.0], [7.0, 7.0]]
    assert bias.tolist() == [8.0, 8.0]


def test_wide_weights_have_no_masters() -> None:
    """They are their own, and the steps are those of torch's AdamW, bit by bit."""
    ours, plain = (nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    optimizers = [MasterAdamW([ours], OptimizerConfig()), torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.0)]
    assert optimizers[0].masters[0] is ours  # type: ignore[attr-defined]
    for _ in range(5):
        for weight, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            (weight.sin() ** 2).sum().backward()
            if isinstance(optimizer, MasterAdamW):
                optimizer.move_gradients()
            optimizer.step()
    assert torch.equal(ours, plain)


def test_steps_under_the_resolution_of_bfloat16_add_up() -> None:
    """Around 1 bfloat16 has steps of 2^-8 below and 2^-7 above: a step of 2^-12 is lost on it, in every iteration. The
    master takes them all; the weight is its rounding, and moves once half a spacing has come together."""
    size = 2.0**-12
    config = OptimizerConfig(learning_rate=size)
    weight, lone = (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    with_master = MasterAdamW([weight], config)
    without = torch.optim.AdamW([lone], lr=size, weight_decay=0.0)
    for done in range(1, 65):
        for parameter in (weight, lone):
            parameter.grad = torch.ones_like(parameter)  # of a constant gradient Adam's step is the step size
        with_master.move_gradients()
        assert weight.grad is None
        with_master.step()
        with_master.zero_grad()
        without.step()
        (master,) = with_master.masters
        torch.testing.assert_close(master.detach(), torch.full((3,), 1 - done * size), rtol=0, atol=1e-6)
        assert torch.equal(weight, master.bfloat16())
        assert torch.equal(lone, torch.ones_like(lone))
        if done in (4, 12):
            assert bool((weight == 1).all()) == (done == 4)
    assert weight.tolist() == [1 - 2.0**-6] * 3


def test_gradients_add_up_in_float32() -> None:
    """256 + 1 is 256 in bfloat16."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], OptimizerConfig())
    for value in (256.0, 1.0, 1.0):
        (value * weight).sum().backward()
        optimizer.move_gradients()
    (master,) = optimizer.masters
    assert master.grad is not None
    assert master.grad.tolist() == [258.0, 258.0]
    optimizer.zero_grad()
    assert master.grad is None


# ---------------------------------------------------------------------- a student in bfloat16


def start(dtype: torch.dtype, **kwargs: Any) -> tuple[DistillAgent, DistillVectorEnv]:
    """A small student of Sums, which reads the same answers of the teacher whatever it is computed in."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = toy_student("sums", 8, 1, 16).to(dtype)
    env = DistillVectorEnv(4, "sums", "sums", chunk=4, autoreset_mode="Disabled", reveal_teacher=False)
    optimizer = OptimizerConfig(1e-3, warmup_iterations=0)
    options = {"optimizer": optimizer, "batch_size": 4, "draft_length": 4, **kwargs}
    return DistillAgent(CausalLM(model, eos_token_id=env.task.eos_token_id), DistillConfig(**options)), env


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def without_masters(agent: DistillAgent) -> DistillAgent:
    """The same, stepping on the bfloat16 weights themselves."""
    optimizer = agent.optimizer
    optimizer.masters, optimizer.narrow = list(agent.student.parameters()), []
    optimizer.param_groups[0]["params"] = optimizer.masters
    return agent


def test_bfloat16_with_masters_stays_near_float32() -> None:
    """Steps of 1e-5 from the same weights on the same answers: the masters follow the float32 run, whose way is ten
    times as long as they are apart; the weights alone lose most of it. Losses and log-probabilities are float32."""
    ends, seen = {}, []
    row, steps = METHODS["fkl"], 6
    wide, env = start(torch.float32, method=row, optimizer=OptimizerConfig(1e-5, warmup_iterations=0))
    narrow, narrow_env = start(torch.bfloat16, method=row, optimizer=OptimizerConfig(1e-5, warmup_iterations=0))
    pure, pure_env = start(torch.bfloat16, method=row, optimizer=OptimizerConfig(1e-5, warmup_iterations=0))
    begin = flat(narrow.optimizer.masters)  # bfloat16's rounding of the weights
    with torch.no_grad():
        for a, b in zip(wide.student.parameters(), narrow.student.parameters(), strict=True):
            a.copy_(b)
    agents = {"float32": (wide, env), "masters": (narrow, narrow_env), "pure": (without_masters(pure), pure_env)}
    for name, (agent, its_env) in agents.items():
        agent.learn(its_env, steps, lambda _, metrics: seen.append(metrics["train/loss"]))
        ends[name] = flat(agent.optimizer.masters)
    way = (ends["float32"] - begin).norm()
    assert (ends["masters"] - ends["float32"]).norm() < 0.1 * way
    assert (ends["pure"] - ends["float32"]).norm() > 0.7 * way
    for a, b in zip(seen[:steps], seen[steps : 2 * steps], strict=True):
        assert a == pytest.approx(b, rel=0.01)
    assert all(p.dtype == torch.bfloat16 for p in narrow.student.parameters())
    assert narrow.student.fork().start([(1, 2)]).dtype == torch.float32
    features = narrow.student.features([(1, 2)], torch.tensor([[3]]), torch.tensor([[True]]))
    assert (features.dtype, narrow.student.head(features).dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("weight_decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_a_resumed_bfloat16_run_equals_the_uninterrupted_one(weight_decay: float, tmp_path: Path) -> None:
    """Masters, moments and weights, bit by bit; the student's folder holds bfloat16."""
    optimizer = OptimizerConfig(1e-3, warmup_iterations=0, weight_decay=weight_decay)
    options = {"method": METHODS["gated"], "micro_batch": 3, "optimizer": optimizer}
    whole, env = start(torch.bfloat16, **options)
    whole.learn(env, 4)
    first, env = start(torch.bfloat16, **options)
    first.learn(env, 2).save(tmp_path / "checkpoint")
    resumed = DistillAgent.load(tmp_path / "checkpoint")
    assert all(p.dtype == torch.bfloat16 for p in resumed.student.parameters())
    _, env = start(torch.bfloat16, **options)
    resumed.learn(env, 2)
    masters = whole.optimizer.tensors()[0], resumed.optimizer.tensors()[0]
    assert masters[0].keys() == masters[1].keys()
    assert sum(name.startswith("master.") for name in masters[0]) == len(list(whole.student.parameters()))
    assert all(torch.equal(masters[0][name], masters[1][name]) for name in masters[0])
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_without_its_masters_is_damaged(tmp_path: Path) -> None:
    agent, _ = start(torch.bfloat16)
    agent.save(tmp_path / "checkpoint")
    wide, _ = start(torch.float32)
    wide.save(tmp_path / "wide")
    (tmp_path / "wide/optimizer.safetensors").replace(tmp_path / "checkpoint/optimizer.safetensors")
    with pytest.raises(ValueError, match=r"^checkpoint: .* is damaged \(KeyError: 'master\.0'\)"):
        DistillAgent.load(tmp_path / "checkpoint")
