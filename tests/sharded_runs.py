"""Runs in float64, of one process or of those that `accelerate launch` starts; no flag of run.py asks for float64.

accelerate launch --use_fsdp ... tests/sharded_runs.py FOLDER '{"a": {"iterations": 6}, "b": {"tied": true}}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from agents.config import DistillConfig
from agents.distill import DistillAgent
from agents.methods import METHODS
from agents.ranks import ALONE, Ended, Ranks, join
from distill_env.env import DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.models.pretrained import recompute_layers
from distill_env.models.small import small_student

# an odd batch, so that one process has a pass more; clipping and decay always at work; more chunks than one
CONFIG = DistillConfig(
    method=METHODS["gated"],
    batch_size=5,
    micro_batch=1,
    chunk_positions=4,
    max_grad_norm=0.05,
    weight_decay=0.1,
    learning_rate=1e-2,
    draft_length=3,
)


def fresh_student(tied: bool, recomputed: bool, dtype: str) -> CausalLM:
    torch.manual_seed(0)
    model: Any = small_student("sums", 16, 2, 32)
    if tied != model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = tied
        model = type(model)(model.config)
    if recomputed:
        recompute_layers(model)
    return CausalLM(model.to(getattr(torch, dtype)), eos_token_id=13)


def numbers(tensors: Any) -> int:
    """How many of them this process holds."""
    return sum(getattr(tensor, "to_local", lambda tensor=tensor: tensor)().numel() for tensor in tensors)


def train(
    folder: Path,
    ranks: Ranks = ALONE,
    iterations: int = 6,
    start: str = "",
    tied: bool = False,
    recomputed: bool = False,
    dtype: str = "float64",
) -> None:
    """Train, perhaps from the checkpoint `start`; the first writes `agent/`, `student/` and the metrics, each what it
    held in an update."""
    rows = len(range(CONFIG.batch_size)[ranks.part(CONFIG.batch_size)])
    env = DistillVectorEnv(
        rows,
        task="sums",
        teacher="sums",
        teacher_kwargs={"dtype": "float64"},
        max_new_tokens=12,
        chunk=4,
        reveal_teacher=False,
        autoreset_mode="Disabled",
    )
    agent = DistillAgent.load(start, ranks) if start else DistillAgent(fresh_student(tied, recomputed, dtype), CONFIG)
    agent.join(ranks)
    told: list[dict[str, float]] = []
    try:
        agent.learn(env, sys.maxsize if ranks.number else iterations, lambda _, metrics: told.append(metrics))
        folder.mkdir(parents=True)
        agent.save(folder / "agent")
        agent.student.export(folder / "student")  # type: ignore[attr-defined]
        (folder / "metrics.json").write_text(json.dumps(told))
        ranks.go_on(False)
    except Ended:
        pass
    state = [t for entry in agent.optimizer.state.values() for t in entry.values() if t.dim()]
    held = {"whole": numbers(agent.student.parameters()), "state": numbers(state)}
    with ranks.split(agent.student):
        held["split"] = numbers(agent.student.parameters())
    Path(f"{folder}-held-{ranks.number}.json").write_text(json.dumps(held))


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = join()
    for name, options in json.loads(sys.argv[2]).items():
        train(Path(sys.argv[1]) / name, processes, **options)
