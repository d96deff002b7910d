"""A teacher and a student over the same token ids: what they share, and how they are loaded. Light to import."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from distill_env.models.hub import absent_ids, id_range
from distill_env.models.load import is_served
from distill_env.tasks.registry import LANGUAGE_TASKS

DRAFT_LIMIT = 16  # tokens of the longest draft
BATCH_SIZE, LEARNING_RATE = 8, 1e-4
READS_DATA = tuple(name for name in LANGUAGE_TASKS if name != "word_problems")
# how models are loaded: `pretrained.read_pretrained` says what each means
BOTH_OPTIONS = ("attn_implementation", "trust_remote_code")
TEACHER_OPTIONS = ("device_map", "quantize", "gguf_file")
STUDENT_OPTIONS = ("gradient_checkpointing",)
ADAPTER_OPTIONS = ("lora_rank", "lora_alpha", "lora_targets")
# arguments of a served teacher, and the names under which the user gives them
SERVED_OPTIONS = {"model": "teacher_model", "top_k": "teacher_top_k", "patience": "teacher_timeout"}


def shared_ids(teacher: Any, student: Any, heads: Iterable[int], names: tuple[str, str]) -> dict[str, Any]:
    """The ids that two models share, as arguments of a model: their number, the end token, and which are no token.

    Args:
        teacher, student: tokenizers.
        heads: rows of the models' heads, which may be fewer or more than the tokenizers' ids.
        names: of teacher and student, for messages.

    Raises:
        ValueError: if the tokenizers map text to ids differently, or have no end token.
    """
    if differing := differing_entries(teacher, student):
        raise ValueError(
            f"student: {names[1]!r} and the teacher {names[0]!r} do not share a tokenizer ({differing} entries "
            "differ); take a student of the teacher's family"
        )
    if teacher.eos_token_id is None:
        raise ValueError(
            f"teacher: the tokenizer of {names[0]!r} has no end-of-sequence token; expected one (--eos-token)"
        )
    vocab_size = min([id_range(teacher), *heads])
    eos, absent = int(teacher.eos_token_id), absent_ids(teacher, vocab_size)
    return {"vocab_size": vocab_size, "eos_token_id": eos, "absent_ids": absent}


def differing_entries(a: Any, b: Any) -> int:
    """The number of entries (a text and its id) that only one of two tokenizers has."""
    return len(set(a.get_vocab().items()) ^ set(b.get_vocab().items()))


@lru_cache(maxsize=8)
def rows_by_configuration(name: str, trust_remote_code: bool = False, gguf_file: str = "") -> int | None:
    """The rows of a model's head by its configuration; None for a served one, or if there is none to read."""
    from transformers import AutoConfig

    from distill_env.models.names import base_of

    if is_served(name):
        return None
    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(base_of(name), trust_remote_code=trust_remote_code, **gguf)
        return int(config.get_text_config(decoder=True).vocab_size)
    except Exception:  # loading the model tells what is wrong with it
        return None


def values_of(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The options of these names that there are."""
    return {name: options[name] for name in names if name in options}


def automatic_device() -> str:
    """The device that `auto` stands for on this machine."""
    from distill_env.models.pretrained import find_device

    return str(find_device("auto"))


def usual_lengths(device: str) -> tuple[int, int]:
    """The longest prompt and completion on a device if nothing else is said, in tokens."""
    return (128, 64) if device == "cpu" else (512, 256)


def usual_dtype(device: str) -> str:
    """The data type that `auto` stands for on a device."""
    return "float32" if device == "cpu" else "bfloat16"
