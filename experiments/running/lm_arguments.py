"""The arguments with which task, teacher, student and tokenizers are loaded for --env lm. Light to import."""

from typing import Any

from agents import pair
from distill_env.models.hub import TokenizerSource, load_tokenizer
from distill_env.models.load import is_served
from distill_env.tasks import registry
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
        accepted = registry.task_arguments(registry.task_class(data.task))
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
    return pair.shared_ids(teacher, student, head_rows(config).values(), (config.teacher.model, config.student.model))


def head_rows(config: RunConfig) -> dict[str, int]:
    """The rows of the heads by the models' configurations, which a tokenizer may exceed; not of a served teacher."""
    remote = config.loading.trust_remote_code
    rows = {
        "student": pair.rows_by_configuration(config.student.model, remote),
        "teacher": pair.rows_by_configuration(config.teacher.model, remote, config.teacher.gguf_file),
    }
    return {who: n for who, n in rows.items() if n is not None}


def teacher_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments of the teacher of --env lm."""
    own = config.teacher
    if is_served(own.model):
        served = {"model": own.served_model, "top_k": own.top_k, "patience": own.timeout}
        return {**shared_ids(config), **served, "tokenizer": teacher_tokenizer(config)}
    arguments = {"dtype": placement(config).dtype, **pair.values_of(vars(own), *pair.TEACHER_OPTIONS)}
    return {**shared_ids(config), **_of_both(config), **arguments}


def student_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments of a student from a checkpoint, which has its ids and its adapter."""
    return _of_both(config) | pair.values_of(vars(config.student), *pair.STUDENT_OPTIONS) if config.env == "lm" else {}


def new_student_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments of a student that a run begins with."""
    own = config.student
    dtype = {"dtype": placement(config).student_dtype}
    if config.env != "lm":
        return dtype if config.env in SMALL_TASKS else {}
    arguments = {**dtype, **shared_ids(config), **student_arguments(config)}
    if own.lora_rank:
        arguments |= pair.values_of(vars(own), *pair.ADAPTER_OPTIONS) | {"lora_seed": config.agent_options.seed}
    return arguments


def _of_both(config: RunConfig) -> dict[str, Any]:
    return {"device": placement(config).device, **pair.values_of(vars(config.loading), *pair.BOTH_OPTIONS)}
