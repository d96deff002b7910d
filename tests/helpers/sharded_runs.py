"""Runs in float64, of one process or of those that `accelerate launch` starts; no flag of run.py asks for float64.

accelerate launch --use_fsdp ... tests/helpers/sharded_runs.py FOLDER '{"a": {"iterations": 6}, "b": {"kind": "tied"}}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.distributed import SINGLE_PROCESS, ProcessGroup, TrainingEnded, init_distributed
from agents.methods import METHODS, variant
from distill_env.env import DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.models.pretrained import recompute_layers
from distill_env.models.toy import toy_student

# an odd batch, so that one process has an extra pass, with completions of several lengths; clipping and weight decay
# always have an effect; several chunks
CONFIG = DistillConfig(
    method=variant(METHODS["gated"], tau=8.0),  # both write
    batch_size=5,
    micro_batch=2,
    chunk_positions=4,
    optimizer=OptimizerConfig(1e-2, weight_decay=0.1, max_grad_norm=0.05),
    draft_length=3,
)


def fresh_student(kind: str) -> CausalLM:
    """`plain`: embedding and head are two matrices; `tied`: one, and layers are computed again; `bfloat16`: as plain;
    or another family."""
    torch.manual_seed(0)
    ids: dict[str, Any] = {"vocab_size": 14, "bos_token_id": None, "eos_token_id": 13, "pad_token_id": None}
    model: Any
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**ids, n_positions=64, n_embd=8, n_layer=2, n_head=2))
    elif kind == "qwen2":
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = Qwen2ForCausalLM(Qwen2Config(**ids, **sizes, num_key_value_heads=1))
    else:
        shell = toy_student("sums", 16, 2, 32)
        shell.config.tie_word_embeddings = kind == "tied"
        model = type(shell)(shell.config)
    if kind == "tied":
        recompute_layers(model)
    student = CausalLM(model.to(torch.bfloat16 if kind == "bfloat16" else torch.float64), eos_token_id=13)
    student.pass_overhead = 0  # alone it computes each length by itself
    return student


def train(
    folder: Path, processes: ProcessGroup = SINGLE_PROCESS, iterations: int = 6, start: str = "", kind: str = "plain"
) -> None:
    """Train, from the checkpoint `start` if given. The main process writes `agent/`, `student/` and the metrics; every
    process writes how many numbers it held."""
    env = DistillVectorEnv(
        len(range(CONFIG.batch_size)[processes.local_slice(CONFIG.batch_size)]),
        task="sums",
        teacher="sums",
        teacher_kwargs={"dtype": "float64"},
        max_new_tokens=12,
        chunk=4,
        reveal_teacher=False,
        autoreset_mode="Disabled",
    )
    agent = DistillAgent.load(start, processes) if start else DistillAgent(fresh_student(kind), CONFIG)
    agent.join_group(processes)
    logged: list[dict[str, float]] = []
    try:
        agent.learn(env, sys.maxsize if processes.rank else iterations, lambda _, metrics: logged.append(metrics))
        folder.mkdir(parents=True)
        agent.save(folder / "agent")
        agent.student.export(folder / "student")  # type: ignore[attr-defined]
        (folder / "metrics.json").write_text(json.dumps(logged))
        processes.continue_or_stop(False)
    except TrainingEnded:
        pass
    state = [t for entry in agent.optimizer.state.values() for t in entry.values() if t.dim()]
    held = {"state": numbers(state), "at rollout": numbers(agent.student.parameters())}
    with processes.sharded(agent.student):
        held["in an update"] = numbers(agent.student.parameters())
    Path(f"{folder}-{processes.rank}.json").write_text(json.dumps(held))


def numbers(tensors: Any) -> int:
    """How many numbers of the tensors this process holds."""
    return sum(getattr(tensor, "to_local", lambda tensor=tensor: tensor)().numel() for tensor in tensors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = init_distributed()
    for name, options in json.loads(sys.argv[2]).items():
        train(Path(sys.argv[1]) / name, processes, **options)
