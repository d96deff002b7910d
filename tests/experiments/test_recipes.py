"""The recipes: the agent that the project shows as an example runs, and configuration files fit what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from distill_env.models.adapters import add_adapter
from experiments import recipes
from experiments import run as run_module
from experiments.benchmarking.device import SHAPES, sized
from experiments.running.flags import parse
from experiments.running.memory_estimate import estimate
from tests.helpers.byte_tokenizer import save_byte_tokenizer
from tests.helpers.tiny_models import write_model

AGENT = "experiments.recipes.reinforce_agent:Reinforce"
FILES = sorted(Path(recipes.__path__[0]).glob("*.yaml"))
QWEN = {
    "Qwen/Qwen2.5-7B-Instruct": SHAPES["qwen2.5-1.5b"].teacher,
    "Qwen/Qwen2.5-1.5B-Instruct": SHAPES["qwen2.5-1.5b"].student,
    "Qwen/Qwen2.5-3B-Instruct": sized(Qwen2Config, "151936 2048 11008 36 16 2", tie_word_embeddings=True),
}


def test_reinforce_learns_a_table(tmp_path: Path) -> None:
    """D_t falls to a third; its parameters are flags."""
    flags = ["--agent", AGENT, "--env", "categorical", "--eval-samples", "8", "--learning-rate", "0.05"]
    out = ["--out", str(tmp_path), "--name", "r", "--validate-every", "100"]
    assert run_module.main([*flags, *out, "--iterations", "60"]) == 0
    evaluation = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert evaluation["training"]["iterations"] == 60
    assert evaluation["after"]["divergence"] < evaluation["before"]["divergence"] / 3


@pytest.mark.parametrize("recipe", FILES, ids=lambda path: path.stem)
def test_a_recipe_gets_to_its_first_token(recipe: Path, tmp_path: Path) -> None:
    """With small models and data in place of its own. The dry run leaves nothing behind."""
    model = write_model(tmp_path / "model", rows=257, max_position_embeddings=4096, eos_token_id=256)
    save_byte_tokenizer(model)
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{i} + 1?", "answer": f"{i + 1} #### {i + 1}"} for i in range(30)]
    data.write_text("".join(json.dumps(row | {"problem": "x", "solution": r"\boxed{2}"}) + "\n" for row in rows))
    flags = ["--config", str(recipe), "--teacher", model, "--student", model, "--out", str(tmp_path / "runs")]
    flags += [] if "word_problems" in recipe.stem else ["--task-path", str(data)]
    size = ["--batch-size", "2", "--max-new-tokens", "4"]
    assert run_module.main([*flags, *size, "--micro-batch", "0", "--device", "cpu", "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("recipe", [f for f in FILES if "Qwen" in f.read_text()], ids=lambda path: path.stem)
def test_a_recipe_says_how_much_memory_it_needs(recipe: Path) -> None:
    config = parse(["--config", str(recipe)])

    def on_meta(name: str) -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(QWEN[name], dtype=torch.bfloat16)

    student = on_meta(config.student.model)
    if config.student.lora_rank:
        add_adapter(student, config.student.lora_rank, config.student.lora_alpha, "all-linear", 0)
    is_local = config.teacher.models[0] in QWEN
    env: Any = SimpleNamespace(
        teacher=SimpleNamespace(model=on_meta(config.teacher.models[0]) if is_local else student),
        num_envs=config.agent_options.batch_size,
        chunk=config.rollout.draft_limit,
        max_new_tokens=config.environment.max_new_tokens,
        max_prompt_length=config.data.max_prompt_tokens,
        max_teacher_prompt_length=config.data.max_prompt_tokens,
        vocab_size=QWEN[config.student.model].vocab_size,
    )
    needs = estimate(config, env, student)
    total = sum(size for name, size in needs.items() if is_local or name != "teacher") / 1e9
    (said,) = re.findall(r"^# Memory: about (\d+) GB", recipe.read_text(), re.M)
    assert int(said) == pytest.approx(total, rel=0.05)
