"""A teacher and a student from names, or from models that are loaded already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from agents.pair import (
    ADAPTER_OPTIONS,
    BOTH_OPTIONS,
    SERVED_OPTIONS,
    STUDENT_OPTIONS,
    TEACHER_OPTIONS,
    automatic_device,
    rows_by_configuration,
    shared_ids,
    usual_dtype,
    values_of,
)
from agents.past_student import PastStudent
from distill_env.checks import errors_name_flags
from distill_env.models.adapters import add_configured_adapter
from distill_env.models.base import TokenModel, TrainableModel
from distill_env.models.causal_lm import CausalLM
from distill_env.models.hub import TokenizerName, TokenizerSource, load_tokenizer
from distill_env.models.load import build_model, is_served, load_model

OPTIONS = (*BOTH_OPTIONS, *TEACHER_OPTIONS, *STUDENT_OPTIONS, *ADAPTER_OPTIONS, *SERVED_OPTIONS.values())


class Pair(NamedTuple):
    """Two models over the same ids, and their tokenizer."""

    student: TrainableModel
    teacher: TokenModel
    tokenizer: Any


def load_pair(
    student: Any,
    teacher: Any,
    tokenizer: Any = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    student_dtype: str = "auto",
    seed: int = 0,
    peft_config: Any = None,
    options: Mapping[str, Any],
) -> Pair:
    """Load what is not loaded yet.

    Args:
        student: a folder, a hub id, or a Transformers model, which is shared, not copied.
        teacher: the same, the URL of a completions server, or "self" for the student as it is now.
        tokenizer: of both, or its folder or hub id; by default the models' own, which have to be the same.
        device, dtype, student_dtype: of what is loaded here; "auto" leaves the choice to the machine.
        seed: of a new adapter's weights.
        peft_config: a `peft.LoraConfig` for the student.
        options: some of OPTIONS.

    Raises:
        ValueError: in one line that names the argument.
        OSError: if there is no such model.
    """
    itself = isinstance(teacher, str) and teacher == "self"
    if itself:
        teacher = student
    elif student is teacher and not isinstance(student, str | Path):
        raise ValueError("teacher: the student itself, which the training changes; expected another model")
    device = automatic_device() if device == "auto" else device
    dtype, student_dtype = (usual_dtype(device) if name == "auto" else name for name in (dtype, student_dtype))
    remote, gguf_file = options.get("trust_remote_code", False), options.get("gguf_file", "")
    served = isinstance(teacher, str) and is_served(teacher)
    sources: list[TokenizerName] = [
        tokenizer if tokenizer is not None else _tokenizer_source(who, model, gguf, remote)
        for who, model, gguf in (
            ("teacher", *((student, "") if served else (teacher, gguf_file))),
            ("student", student, ""),
        )
    ]
    tokenizers = [load_tokenizer(source) for source in sources]
    rows = [_head_rows(student, remote), _head_rows(teacher, remote, gguf_file)]
    heads = [n for n in rows if n is not None]
    ids = shared_ids(tokenizers[0], tokenizers[1], heads, (name_of(teacher), name_of(student)))
    shared = {**ids, "device": device, **values_of(options, *BOTH_OPTIONS)}
    learner: TrainableModel
    if not isinstance(student, str | Path):
        _refuse_options("student", options, (*STUDENT_OPTIONS, *ADAPTER_OPTIONS))
        learner = _wrapped("student", student, ids, peft_config, seed)
    else:
        own = values_of(options, *STUDENT_OPTIONS, *ADAPTER_OPTIONS)
        own |= {"dtype": student_dtype, "peft_config": peft_config, "lora_seed": seed}
        with errors_name_flags({"name_or_path": "student"}):
            learner = build_model(student, **shared, **own)
    loaded: TokenModel
    if itself and not isinstance(student, str | Path):
        loaded = PastStudent(learner).model
    elif not isinstance(teacher, str | Path):
        _refuse_options("teacher", options, TEACHER_OPTIONS)
        loaded = _wrapped("teacher", teacher, ids)
    elif served:
        own = {name: options[option] for name, option in SERVED_OPTIONS.items() if option in options}
        with errors_name_flags({"url": "teacher", **SERVED_OPTIONS}):
            loaded = build_model(teacher, **ids, **own, tokenizer=sources[0])
    else:
        with errors_name_flags({"name_or_path": "teacher"}):
            loaded = load_model(teacher, **shared, dtype=dtype, **values_of(options, *TEACHER_OPTIONS))
    return Pair(learner, loaded, tokenizers[0])


def name_of(model: Any) -> str:
    """The folder, hub id or URL of a model, or its type if it has none."""
    return str(model) if isinstance(model, str | Path) else getattr(model, "name_or_path", "") or type(model).__name__


def _tokenizer_source(who: str, model: Any, gguf_file: str, trust_remote_code: bool) -> TokenizerSource:
    name = str(model) if isinstance(model, str | Path) else getattr(model, "name_or_path", "")
    if not name:
        raise ValueError(f"tokenizer: none, and the {who} has no folder with one; expected a tokenizer or its folder")
    return TokenizerSource(name, gguf_file, trust_remote_code)


def _head_rows(model: Any, trust_remote_code: bool, gguf_file: str = "") -> int | None:
    if isinstance(model, str | Path):
        return rows_by_configuration(str(model), trust_remote_code, gguf_file)
    if hasattr(model, "get_output_embeddings"):
        return int(model.get_output_embeddings().weight.shape[0])
    return getattr(model, "vocab_size", None)


def _refuse_options(who: str, options: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raise ValueError if it is said how a model is loaded that is loaded already."""
    for name, value in values_of(options, *names).items():
        raise ValueError(f"{name}: {value!r} with a {who} that is loaded already; expected its folder or hub id")


def _wrapped(who: str, model: Any, ids: dict[str, Any], peft_config: Any = None, seed: int = 0) -> Any:
    """A Transformers model as a token model. A token model is returned as it is."""
    if hasattr(model, "extend"):
        return model
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"{who}: {type(model).__name__}; expected a folder, a hub id or a causal language model")
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's wrapper shares its modules
    if peft_config is not None:
        add_configured_adapter(plain, peft_config, seed)
    try:
        return CausalLM(plain, **ids)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
