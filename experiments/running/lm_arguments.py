"""The arguments with which task, teacher, student and tokenizers are loaded for --env lm. Light to import."""

import inspect
from functools import lru_cache
from typing import Any

from distill_env.models.hub import TokenizerSource, absent_ids, id_range, load_tokenizer
from distill_env.models.load import is_served
from distill_env.tasks.registry import import_name
from experiments.running.config import SMALL_TASKS, RunConfig
from experiments.running.placement import placement


def teacher_tokenizer(config: RunConfig) -> TokenizerSource:
    """The teacher's tokenizer. That of a served teacher is the student's, unless --teacher-tokenizer is given."""
    if is_served(config.teacher.model):
        name = config.teacher.tokenizer or config.student.model
        return TokenizerSource(name, trust_remote_code=config.loading.trust_remote_code)
    return TokenizerSource(config.teacher.model, config.teacher.gguf_file, config.loading.trust_remote_code)


def student_tokenizer(config: RunConfig) -> TokenizerSource:
    return TokenizerSource(config.student.model, trust_remote_code=config.loading.trust_remote_code)


def task_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments of the task. Raises ValueError for a flag that the task does not have."""
    data = config.data
    arguments: dict[str, Any] = {
        "path": data.path,
        "tokenizer": teacher_tokenizer(config),
        "max_prompt_tokens": data.max_prompt_tokens,
        "step_pattern": data.step_pattern,
        "vocab_size": shared_ids(config)["vocab_size"],
    }
    if data.task != "text":
        chat = {"auto": None, "yes": True, "no": False}[data.chat]
        arguments |= {"chat": chat, "few_shot": data.few_shot}
        if ":" not in data.task:
            return arguments
        accepted = inspect.signature(import_name("task", data.task)).parameters
        return {name: value for name, value in arguments.items() if name in accepted}
    if data.few_shot or data.chat == "yes":
        raise ValueError("few_shot, chat: not with --task text, which has no questions; expected 0, auto or no")
    horizon = config.environment.max_new_tokens
    return arguments | ({"max_new_tokens": horizon} if horizon else {})


def require_models(config: RunConfig) -> None:
    """Raise ValueError if --env lm has no teacher or no student."""
    for name, model in (("teacher", config.teacher.model), ("student", config.student.model)):
        if not model:
            raise ValueError(f"{name}: --env lm needs --{name}")


def shared_ids(config: RunConfig) -> dict[str, Any]:
    """The ids that teacher and student share, as arguments of a model: their number, the end token, and which of them
    are no token.

    Raises:
        ValueError: without a teacher or a student, or if their tokenizers map text to ids differently.
    """
    require_models(config)
    teacher, student = load_tokenizer(teacher_tokenizer(config)), load_tokenizer(student_tokenizer(config))
    differing = differing_entries(teacher, student)
    if differing:
        raise ValueError(
            f"student: {config.student.model!r} and the teacher {config.teacher.model!r} do not share a tokenizer "
            f"({differing} entries differ); take a student of the teacher's family"
        )
    if teacher.eos_token_id is None:
        raise ValueError(f"teacher: the tokenizer of {config.teacher.model!r} has no end-of-sequence token")
    vocab_size = min([id_range(teacher), *head_rows(config).values()])
    eos, absent = int(teacher.eos_token_id), absent_ids(teacher, vocab_size)
    return {"vocab_size": vocab_size, "eos_token_id": eos, "absent_ids": absent}


def head_rows(config: RunConfig) -> dict[str, int]:
    """The rows of the heads by the models' configurations, which a tokenizer may exceed; not of a served teacher."""
    remote = config.loading.trust_remote_code
    rows = {"student": _rows_by_configuration(config.student.model, remote)}
    if not is_served(config.teacher.model):
        rows["teacher"] = _rows_by_configuration(config.teacher.model, remote, config.teacher.gguf_file)
    return {who: n for who, n in rows.items() if n is not None}


@lru_cache(maxsize=8)
def _rows_by_configuration(name: str, trust_remote_code: bool, gguf_file: str = "") -> int | None:
    from transformers import AutoConfig

    from distill_env.models.adapters import base_of

    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(base_of(name), trust_remote_code=trust_remote_code, **gguf)
        return int(config.get_text_config(decoder=True).vocab_size)
    except Exception:  # loading the model tells what is wrong with it
        return None


def differing_entries(a: Any, b: Any) -> int:
    """The number of entries (a text and its id) that only one of two tokenizers has."""
    return len(set(a.get_vocab().items()) ^ set(b.get_vocab().items()))


def teacher_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments of the teacher of --env lm."""
    own = config.teacher
    if is_served(own.model):
        served = {"model": own.served_model, "top_k": own.top_k, "patience": own.timeout}
        return {**shared_ids(config), **served, "tokenizer": teacher_tokenizer(config)}
    arguments = {"dtype": placement(config).dtype, **_values(own, "device_map", "quantize", "gguf_file")}
    return {**shared_ids(config), **_of_both(config), **arguments}


def student_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments of a student from a checkpoint, which has its ids and its adapter."""
    return _of_both(config) | _values(config.student, "gradient_checkpointing") if config.env == "lm" else {}


def new_student_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments of a student that a run begins with."""
    own = config.student
    dtype = {"dtype": placement(config).student_dtype}
    if config.env != "lm":
        return dtype if config.env in SMALL_TASKS else {}
    arguments = {**dtype, **shared_ids(config), **student_arguments(config)}
    if own.lora_rank:
        arguments |= _values(own, "lora_rank", "lora_alpha", "lora_targets") | {"lora_seed": config.agent_options.seed}
    return arguments


def _of_both(config: RunConfig) -> dict[str, Any]:
    return {"device": placement(config).device, **_values(config.loading, "attn_implementation", "trust_remote_code")}


def _values(section: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(section, name) for name in names}
