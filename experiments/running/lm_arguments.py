"""What the flags of --env lm say about loading: arguments of teacher, student and their tokenizers. Light to import."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from distill_env.models.hub import TokenizerSource, load_tokenizer
from distill_env.models.load import is_served

if TYPE_CHECKING:
    from experiments.running.config import AnyRun


def check_flags(config: Any) -> None:
    """Raises ValueError for flags that contradict each other; config is a `RunConfig`."""
    for name in ("lora_alpha", "teacher_timeout"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}: {getattr(config, name)}; accepted: a positive, finite number")
    if config.gguf_file and config.quantize != "none":
        raise ValueError(f"gguf_file: {config.gguf_file!r} with quantize {config.quantize}; accepted: one of the two")


def teacher_tokenizer(config: AnyRun) -> TokenizerSource:
    """Where the tokenizer of the teacher is; of a served one beside the student, unless --teacher-tokenizer says."""
    if is_served(config.teacher):
        name = config.teacher_tokenizer or config.student
        return TokenizerSource(name, trust_remote_code=config.trust_remote_code)
    return TokenizerSource(config.teacher, config.gguf_file, config.trust_remote_code)


def student_tokenizer(config: AnyRun) -> TokenizerSource:
    return TokenizerSource(config.student, trust_remote_code=config.trust_remote_code)


def shared_ids(config: AnyRun) -> dict[str, int]:
    """The ids that teacher and student share, those of their tokenizer, which has to be one; and its end token.

    Raises:
        ValueError: if the tokenizers map text to ids differently.
    """
    teacher, student = load_tokenizer(teacher_tokenizer(config)), load_tokenizer(student_tokenizer(config))
    differing = differing_entries(teacher, student)
    if differing:
        raise ValueError(
            f"student: {config.student!r} and the teacher {config.teacher!r} do not share a tokenizer ({differing} "
            "entries differ); take a student of the teacher's family"
        )
    if teacher.eos_token_id is None:
        raise ValueError(f"teacher: the tokenizer of {config.teacher!r} has no end-of-sequence token")
    return {"vocab_size": len(teacher), "eos_token_id": int(teacher.eos_token_id)}


def differing_entries(a: Any, b: Any) -> int:
    """How many entries, a text and its id, only one of two tokenizers has."""
    return len(set(a.get_vocab().items()) ^ set(b.get_vocab().items()))


def teacher_arguments(config: AnyRun) -> dict[str, Any]:
    """How the teacher of --env lm is loaded, or asked."""
    if is_served(config.teacher):
        served = {"model": config.teacher_model, "top_k": config.teacher_top_k, "patience": config.teacher_timeout}
        return {**shared_ids(config), **served, "tokenizer": teacher_tokenizer(config)}
    return {
        **shared_ids(config),
        "dtype": config.dtype,
        "device_map": config.device_map,
        "quantize": config.quantize,
        "gguf_file": config.gguf_file,
        **_of_both(config),
    }


def student_arguments(config: AnyRun) -> dict[str, Any]:
    """How a student of --env lm is loaded, also from a checkpoint, which knows its ids and its adapter."""
    if config.env != "lm":
        return {}
    return {"gradient_checkpointing": config.gradient_checkpointing, **_of_both(config)}


def adapter_arguments(config: AnyRun) -> dict[str, Any]:
    """The adapter of a student that begins."""
    if not config.lora_rank:
        return {}
    return {
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_targets": config.lora_targets,
        "lora_seed": config.options.seed,
    }


def _of_both(config: AnyRun) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("device", "attn_implementation", "trust_remote_code")}
