"""The arguments of the environments, for type checkers and for checks. Light to import: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from gymnasium.vector import AutoresetMode

from distill_env.models.base import TokenModel
from distill_env.tasks.base import Split, Task

RewriteDraw = Literal["sample", "nucleus", "argmax"]
RewriteSpan = Literal["token", "step"]
ObservationForm = Literal["ids", "float", "one_hot"]
RenderMode = Literal["ansi", "rgb_array"]
AutoresetName = Literal["NextStep", "SameStep", "Disabled"]


class EnvArguments(TypedDict, total=False):
    """What both environments take; `DistillVectorEnv` says what each argument means, and holds the defaults."""

    task: str | Task
    teacher: str | TokenModel | Mapping[str, str | TokenModel] | None
    split: Split
    task_kwargs: dict[str, Any] | None
    teacher_kwargs: dict[str, Any] | None
    max_new_tokens: int | None
    rewrite: RewriteDraw
    rewrite_top_p: float
    rewrite_temperature: float
    rewrite_span: RewriteSpan
    rewrite_cost: float
    log_prob_floor: float
    task_reward: float
    chunk: int
    reveal_teacher: bool
    observation: ObservationForm
    render_mode: RenderMode | None


class VectorEnvArguments(EnvArguments, total=False):
    """What `DistillVectorEnv` takes."""

    num_envs: int
    autoreset_mode: AutoresetMode | AutoresetName
