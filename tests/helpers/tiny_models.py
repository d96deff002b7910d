"""Folders with small random language models and a tokenizer, as --env lm takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill_env.models.toy import toy_tokenizer

IDS, EOS = 14, 13  # of the tokenizer


def write_model(folder: Path, seed: int = 0, rows: int = IDS, **extra: Any) -> str:
    """A Llama with so many rows in embedding and head, far from uniform, and the tokenizer of Sums."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**options | extra))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    toy_tokenizer("sums").save_pretrained(folder)
    return str(folder)


def write_prompts(folder: Path) -> str:
    path = folder / "prompts.txt"
    path.write_text("".join(f"{a}+{a + 2}+{9 - a}=\n" for a in range(8)))
    return str(path)


def flags(teacher: str, student: str, prompts: str, *more: object) -> list[str]:
    """A run of these two that takes seconds and repeats itself."""
    size = ["--batch-size", 4, "--max-new-tokens", 6, "--draft-length", 3, "--eval-prompts", 2, "--eval-samples", 1]
    paths = ["--teacher", teacher, "--student", student, "--task-path", prompts]
    return [str(x) for x in ("--env", "lm", *paths, *size, "--validate-every", 9, "--track", "none", *more)]


def move_ids(folder: str, **ids: int) -> None:
    """Give entries of the folder's tokenizer other ids, so that theirs are holes, or add entries."""
    path = Path(folder) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {name.removeprefix("_"): i for name, i in ids.items()}
    path.write_text(json.dumps(tokenizer))
