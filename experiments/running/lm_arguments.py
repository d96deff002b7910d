"""The arguments with which task, teacher, student and tokenizers are loaded for --env lm. Light to import."""

from typing import Any

from agents import pair
from distill_env.models.hub import TokenizerSource, load_tokenizer
from distill_env.models.load import is_served
from distill_env.tasks import registry
from experiments.running.config import SMALL_TASKS, RunConfig
from experiments.running.placement import placement

# values of the data's flags with which a task need not know them
NOT_GIVEN: dict[str, Any] = {"chat": None, "few_shot": 0, "chat_template_kwargs": "", "train_on": "last"}
NOT_GIVEN |= {"skip_bad_rows": False, "references": False, "teacher_prompt": "", "teacher_few_shot": 0}


def teacher_tokenizer(config: RunConfig) -> TokenizerSource:
    """The tokenizer of the teacher, or of the first of several. That of a served one is the student's, unless
    --teacher-tokenizer is given."""
    return next(iter(local_tokenizers(config).values()), served_tokenizer(config))


def local_tokenizers(config: RunConfig) -> dict[str, TokenizerSource]:
    """The tokenizers of the teachers that are loaded here, by name."""
    return {name: _tokenizer(config, model, config.teacher.gguf_file) for name, model in config.teacher.local.items()}


def served_tokenizer(config: RunConfig) -> TokenizerSource:
    return _tokenizer(config, config.teacher.tokenizer or config.student.model)


def student_tokenizer(config: RunConfig) -> TokenizerSource:
    return _tokenizer(config, config.student.model)


def _tokenizer(config: RunConfig, name: str, gguf_file: str = "") -> TokenizerSource:
    data = config.data
    return TokenizerSource(name, gguf_file, config.loading.trust_remote_code, data.chat_template, data.eos_token)


def task_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments of the task. Raises ValueError for a flag that the task does not have."""
    data = config.data
    arguments: dict[str, Any] = {
        "path": data.path,
        "tokenizer": teacher_tokenizer(config),
        "max_prompt_tokens": data.max_prompt_tokens,
        "max_teacher_prompt_tokens": data.max_teacher_prompt_tokens,
        "step_pattern": data.step_pattern,
        "vocab_size": shared_ids(config)["vocab_size"],
    }
    chat = {"auto": None, "yes": True, "no": False}[data.chat]
    given = {
        "chat": chat,
        "few_shot": data.few_shot,
        "chat_template_kwargs": data.chat_template_kwargs,
        "train_on": data.train_on,
        "skip_bad_rows": data.skip_bad_rows,
        "teacher_prompt": data.teacher_prompt,
        "teacher_few_shot": data.teacher_few_shot,
        "references": config.method is not None and config.method.teacher_writes == "reference",
    }
    arguments |= {name: value for name, value in given.items() if value != NOT_GIVEN[name]}
    if data.task == "text" and config.environment.max_new_tokens:
        arguments["max_new_tokens"] = config.environment.max_new_tokens
    accepted = registry.task_arguments(registry.task_class(data.task))
    for name in {*given} & {*arguments} - accepted - {"references"}:
        if arguments[name] is not False:  # no chat is what a task without one has
            expected = "auto or no" if name == "chat" else repr(NOT_GIVEN[name])
            raise ValueError(f"{name}: {arguments[name]!r} has no effect with --task {data.task}; expected {expected}")
    return {name: value for name, value in arguments.items() if name in accepted}


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
    student, rows = load_tokenizer(student_tokenizer(config)), head_rows(config).values()
    found = [
        pair.shared_ids(load_tokenizer(source), student, rows, (config.teacher.by_name[name], config.student.model))
        for name, source in local_tokenizers(config).items()
    ]
    if found:
        return found[0]
    names = config.teacher.model, config.student.model
    return pair.shared_ids(load_tokenizer(served_tokenizer(config)), student, rows, names)


def head_rows(config: RunConfig) -> dict[str, int]:
    """The rows of the heads by the models' configurations, which a tokenizer may exceed; not of a served teacher."""
    remote = config.loading.trust_remote_code
    rows = {"student": pair.rows_by_configuration(config.student.model, remote)} | {
        f"teacher {name}".rstrip(): pair.rows_by_configuration(model, remote, config.teacher.gguf_file)
        for name, model in config.teacher.local.items()
    }
    return {who: n for who, n in rows.items() if n is not None}


def teachers(config: RunConfig) -> dict[str, Any]:
    """The teacher of --env lm, or several by name, as arguments of the environment."""
    by_name = config.teacher.by_name
    arguments = {name: teacher_arguments(config, model) for name, model in by_name.items()}
    if "" in by_name:
        return {"teacher": by_name[""], "teacher_kwargs": arguments[""]}
    return {"teacher": by_name, "teacher_kwargs": arguments}


def teacher_arguments(config: RunConfig, model: str) -> dict[str, Any]:
    """The arguments of a teacher of --env lm."""
    own = config.teacher
    if is_served(model):
        served = {"model": own.served_model, "top_k": own.top_k, "patience": own.timeout}
        return {**shared_ids(config), **served, "tokenizer": served_tokenizer(config)}
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
