"""A cache on disk for rollouts that do not depend on the student, such as completions of the teacher."""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from agents.atomic_io import write_file
from agents.methods import Method, check_cacheable
from agents.rollout import Rollout, RolloutCost
from agents.rollout_metrics import TEACHER_COSTS
from distill_env.tasks.base import Prompt

VERSION = 2  # raise it if the same settings give another rollout, or the format of a file changes
TENSORS = ("tokens", "rewritten", "rewards", "token_log_prob", "score", "grades", "teacher", "support")


class TeacherCache:
    """Rollouts on disk, one file each, named by a hash of everything that determines a rollout.

    That is the teacher's weights and configuration in memory, the prompts and the keys of their draws, the settings of
    the environment, and which of the teacher's distributions are stored. The machine and the number of rows are left
    out, since they change a rollout by rounding only.

    The `cost` of a rollout that is read from disk is 0; `cached_cost` is what it cost when it was written.

    Args:
        folder: the folder of the files, created if necessary. Several runs may share it.
        warn: called with a message if a file is damaged. The rollout is then made again.

    Raises:
        OSError: if the folder cannot be created.
    """

    def __init__(self, folder: str | Path, warn: Callable[[str], object] = warnings.warn) -> None:
        self.folder, self.warn = Path(folder), warn
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"teacher_cache: {str(folder)!r} cannot be created ({error}); expected a folder") from None
        self._settings: tuple[Any, dict[str, Any]] | None = None  # of the last environment, and that

    def rollout(
        self,
        env: Any,
        method: Method,
        prompts: Sequence[Prompt],
        keys: NDArray[np.uint64],
        write: Callable[[], Rollout],
    ) -> Rollout:
        """The rollout that `write` returns, or the same one from disk.

        Raises:
            ValueError: if the method's rollouts depend on the student, or the environment is wrapped.
            OSError: if the file cannot be written.
        """
        check_cacheable(method)
        core = env.unwrapped
        if env is not core:
            raise ValueError(f"teacher_cache: the environment is wrapped by {type(env).__name__}; expected no wrapper")
        if self._settings is None or self._settings[0] is not core:
            self._settings = core, settings_of(core)
        references = method.teacher_writes == "reference"
        key = {
            **self._settings[1],
            "prompts": [
                [p.teacher, p.ids, p.ids_for_teacher, p.final_answer, p.reference_completion if references else None]
                for p in prompts
            ],
            "keys": keys.tolist(),
            "teacher_writes": method.teacher_writes,
            "stored": [method.needs_teacher, method.top_k, method.top_p],
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name[:32]}.safetensors"
        if path.exists():
            try:
                return replace(_read(path, list(prompts), core), from_data=references)
            except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
                reason = str(error).partition("\n")[0]
                self.warn(f"teacher_cache: {str(path)!r} is damaged ({reason}); the rollout is made again")
        rollout = write()
        _save(path, rollout)
        return rollout


def settings_of(core: Any) -> dict[str, Any]:
    """The settings of a `DistillVectorEnv` that determine the teacher's completions, for JSON."""
    return {
        "version": VERSION,
        "teacher": fingerprint(core.teacher),
        "ids": [core.vocab_size, core.task.eos_token_id, *sorted(core.task.step_end_ids)],
        "task": type(core.task).__name__,
        "rewrite": [core.rewrite, core.rewrite_top_p, core.rewrite_temperature, core.rewrite_span],
        "rewards": [core.rewrite_cost, core.log_prob_floor, core.task_reward],
        "max_new_tokens": core.max_new_tokens,
    }


def fingerprint(model: Any) -> str:
    """A hash of a model's weights, bit by bit, and of its configuration without its origin.

    Raises:
        ValueError: for a model whose weights are not in memory.
    """
    if hasattr(model, "teachers"):  # several, each with a name
        return json.dumps({name: fingerprint(part) for name, part in model.teachers.items()}, sort_keys=True)
    state = model.state_dict() if hasattr(model, "state_dict") else {}
    if not state or any(isinstance(t, Tensor) and t.is_meta for t in state.values()):
        expected = "expected a local model that is not offloaded to disk"
        raise ValueError(f"teacher_cache: the weights of the {type(model).__name__} are not in memory; {expected}")
    config = getattr(getattr(model, "model", None), "config", None)
    settings = {} if config is None else config.to_dict()
    for origin in ("_name_or_path", "transformers_version"):
        settings.pop(origin, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    absent = getattr(model, "absent_ids", ()) or ""
    digest.update(f"{type(model).__name__} {model.vocab_size} {model.eos_token_id}{absent}".encode())
    return _hash_tensors(digest, {k: v for k, v in state.items() if isinstance(v, Tensor)})


def _hash_tensors(digest: Any, tensors: dict[str, Tensor]) -> str:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _save(path: Path, rollout: Rollout) -> None:
    fields = {name: getattr(rollout, name) for name in TENSORS}
    tensors = {name: t.detach().cpu().contiguous() for name, t in fields.items() if t is not None}
    cost = {name: getattr(rollout.cost, name) for name in TEACHER_COSTS}
    metadata = {"digest": _hash_tensors(hashlib.sha256(), tensors), "cost": json.dumps(cost)}

    def write(aside: Path) -> None:
        # safetensors refuses tensors that share memory; the teacher's, which are large, share it with no others
        large = ("teacher", "support")
        save_file({k: t if k in large else t.clone() for k, t in tensors.items()}, aside, metadata=metadata)

    write_file(path, write, shared=True)


def _read(path: Path, prompts: list[Prompt], core: Any) -> Rollout:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _hash_tensors(hashlib.sha256(), tensors) != metadata["digest"]:
        raise ValueError("wrong checksum")
    fields: dict[str, Any] = {name: tensors.get(name) for name in TENSORS}
    fields["cached_cost"] = RolloutCost(**json.loads(metadata["cost"]))
    return Rollout(prompts=prompts, step_end_ids=tuple(sorted(core.task.step_end_ids)), **fields)
