"""A picture of the gate at work: the score of each position against tau, above the token and its writer."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from agents.rollout import Parts, completions_of
from distill_env.tasks.base import Task
from experiments.answering.assisted import AssistedCompletions
from experiments.reporting import figures
from experiments.reporting.drawing import PAGE, Panel, Style, png
from experiments.reporting.viewer import token_text


def clearest(completions: AssistedCompletions) -> Parts:
    """The completion with the most visible bars of both writers; of several, the one with the lowest peak."""

    def clarity(part: Parts) -> tuple[int, float]:
        own = [score for score, by_teacher in zip(part.scores, part.rewritten, strict=True) if not by_teacher]
        visible = sum(score > completions.tau / 10 for score in own)
        return min(visible, sum(part.rewritten)), -max(part.scores)

    return max(completions_of(completions.rollout), key=clarity)


def draw_gate(task: Task, completions: AssistedCompletions, path: Path) -> None:
    """Write the picture of one completion.

    Raises:
        ValueError: if the gate compared no scores with tau.
    """
    if not 0 < completions.tau < math.inf:
        raise ValueError(f"tau: {completions.tau:g} with picture; expected a positive, finite number")
    part = clearest(completions)
    texts = [token_text(task, token) for token in part.tokens]
    draw = partial(figures.gate, texts=texts, scores=part.scores, rewritten=part.rewritten, tau=completions.tau)
    png([Panel(f"prompt  {part.prompt.text}", draw, width=PAGE)], path, Style(()))
