"""Files to damage in copies, ways to damage them, and the one line that names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

V, EOS, CONTEXT = 257, 256, 64
W, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
Damage = Callable[[Path], Any]


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **({"eos_token": "<e>"} | options))


def write_language_model(folder: Path, **options: Any) -> Path:
    """One layer, 64 tokens of context, a token a byte and `<e>` the end."""
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    special = {"eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=CONTEXT, **shape, **special))
    model.save_pretrained(folder)
    tokenizer(**options).save_pretrained(str(folder))
    return folder


def each(table: dict[str, Any]) -> pytest.MarkDecorator:
    """The cases of a table, with the name that the line has to hold."""
    rows = [pytest.param(c, name, id=f"{name}-{i}") for name, group in table.items() for i, c in enumerate(group)]
    return pytest.mark.parametrize(("case", "name"), rows)


def row(**columns: Any) -> str:
    return json.dumps(columns) + "\n"


def is_one_line_with(line: str, *names: str) -> None:
    """That an error is one line that names the argument, the file or the place."""
    assert line.splitlines() == [line]
    assert len(line) < 2000
    for name in names:
        assert name.replace("-", "_") in line.replace("-", "_"), line


def is_refused(call: Callable[[], Any], *names: str) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        call()
    is_one_line_with(str(error.value), *names)


def edit(file: str, **changes: Any) -> Damage:
    """A JSON file with other values; None takes the key away."""

    def damage(folder: Path) -> None:
        fields = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))

    return damage


def write(file: str, content: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content)


def cut(file: str) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-50])


def lose(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def weights(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return damage


def one(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1)[77:78].fill_(value)
