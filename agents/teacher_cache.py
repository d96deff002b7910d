"""What a teacher wrote, kept on disk: answers that do not depend on the student are paid for once."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
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
from distill_env.tasks.base import Prompt

VERSION = 1  # to be raised when the same settings come to give other answers, or a file holds something else
TENSORS = ("tokens", "rewritten", "rewards", "token_log_prob", "score", "grades", "teacher", "support")


class TeacherCache:
    """Rollouts that no student has a part in, a file each, named by all that determines them.

    That is the teacher (its weights and configuration as they are in memory, wherever they came from), the prompts with
    the keys of their draws, the environment's settings, and what is kept of the teacher. Not in the name is what only
    rounds otherwise: the machine, and the number of rows.

    A rollout that is read has cost nothing: its cost is 0, and what it cost when it was written is in `cached_cost`.

    Args:
        folder: where the files lie, made if need be; several runs may share it.
        warn: is told of a damaged file, which is written anew.

    Raises:
        OSError: if the folder cannot be made.
    """

    def __init__(self, folder: str | Path, warn: Callable[[str], object] = warnings.warn) -> None:
        self.folder, self.warn = Path(folder), warn
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"teacher_cache: {str(folder)!r} cannot be made ({error}); accepted: a folder") from None
        self._known: tuple[Any, dict[str, Any]] | None = None  # an environment and its settings

    def rollout(
        self,
        env: Any,
        method: Method,
        prompts: Sequence[Prompt],
        keys: NDArray[np.uint64],
        write: Callable[[], Rollout],
    ) -> Rollout:
        """What `write` returns, read from disk if it was written before.

        Raises:
            ValueError: if the method's answers depend on the student, or the environment is wrapped.
            OSError: if it cannot be written.
        """
        check_cacheable(method)
        core = env.unwrapped
        if env is not core:
            raise ValueError(f"teacher_cache: the environment is wrapped by {type(env).__name__}; accepted: unwrapped")
        if self._known is None or self._known[0] is not core:
            self._known = core, settings_of(core)
        references = method.teacher_writes == "reference"
        told = {
            **self._known[1],
            "prompts": [[p.ids, p.final_answer, p.reference_completion if references else None] for p in prompts],
            "keys": keys.tolist(),
            "writer": method.teacher_writes,
            "kept": [method.needs_teacher, method.top_k, method.top_p],
        }
        name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name[:32]}.safetensors"
        if path.exists():
            try:
                return _read(path, list(prompts), core)
            except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
                reason = str(error).partition("\n")[0]
                self.warn(f"teacher_cache: {str(path)!r} is damaged ({reason}); the teacher writes it again")
        rollout = write()
        _save(path, rollout)
        return rollout


def settings_of(core: Any) -> dict[str, Any]:
    """What of a `DistillVectorEnv` determines the teacher's answers, as JSON takes it."""
    return {
        "version": VERSION,
        "teacher": fingerprint(core.teacher),
        "ids": [core.vocab_size, core.task.eos_token_id, *sorted(core.task.step_end_ids)],
        "task": type(core.task).__name__,
        "rewrite": [core.rewrite, core.rewrite_top_p, core.rewrite_span],
        "paid": [core.rewrite_cost, core.log_prob_floor, core.task_reward],
        "max_new_tokens": core.max_new_tokens,
    }


def fingerprint(model: Any) -> str:
    """A hash of a model's weights, bit by bit, and of its configuration but for where it came from.

    Raises:
        ValueError: for a model whose weights cannot be read.
    """
    state = model.state_dict() if hasattr(model, "state_dict") else {}
    if not state or any(isinstance(t, Tensor) and t.is_meta for t in state.values()):
        raise ValueError(
            f"teacher_cache: the weights of the teacher, a {type(model).__name__}, are not in memory, by which it is "
            "told from others; accepted: a local model that is not offloaded to disk"
        )
    config = getattr(getattr(model, "model", None), "config", None)
    described = {} if config is None else config.to_dict()
    for place in ("_name_or_path", "transformers_version"):
        described.pop(place, None)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    digest.update(f"{type(model).__name__} {model.vocab_size} {model.eos_token_id}".encode())
    _hash_tensors(digest, {k: v for k, v in state.items() if isinstance(v, Tensor)})
    return digest.hexdigest()


def _hash_tensors(digest: Any, tensors: dict[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())


def _save(path: Path, rollout: Rollout) -> None:
    found = {name: getattr(rollout, name) for name in TENSORS}
    tensors = {name: t.detach().cpu().contiguous() for name, t in found.items() if t is not None}
    digest = hashlib.sha256()
    _hash_tensors(digest, tensors)
    cost = [rollout.cost.teacher_passes, rollout.cost.teacher_positions, rollout.cost.teacher_tokens]
    about = {"digest": digest.hexdigest(), "cost": json.dumps(cost)}

    def write(aside: Path) -> None:
        # no two may share their memory; the teacher's distributions, which are large, share it with none
        large = ("teacher", "support")
        save_file({k: t if k in large else t.clone() for k, t in tensors.items()}, aside, metadata=about)

    write_file(path, write, shared=True)


def _read(path: Path, prompts: list[Prompt], core: Any) -> Rollout:
    with safe_open(path, "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digest = hashlib.sha256()
    _hash_tensors(digest, tensors)
    if digest.hexdigest() != about["digest"]:
        raise ValueError("its checksum is another one")
    passes, positions, tokens = json.loads(about["cost"])
    cached = RolloutCost(teacher_passes=passes, teacher_positions=positions, teacher_tokens=tokens)
    named = {name: tensors.get(name) for name in TENSORS}
    steps = tuple(sorted(core.task.step_end_ids))
    return Rollout(prompts=prompts, **named, step_end_ids=steps, cached_cost=cached)  # type: ignore[arg-type]
