"""One measurement in a process of its own: iterations of an agent or of a TRL trainer, or a single update.

`experiments/benchmark.py` starts it. It prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.methods import METHODS
from agents.rollout import Rollout
from distill_env.models.hub import load_tokenizer
from distill_env.models.load import build_model
from distill_env.tasks.instruct import InstructTask
from experiments.benchmarking.config import BenchmarkConfig


@dataclass(frozen=True)
class PeerConfig:
    """Measure one contender."""

    name: tyro.conf.Positional[Literal["gated", "rkl", "DistillationTrainer", "GKDTrainer", "update"]]
    """An agent, a trainer of TRL, or `update`: the backward pass and the optimizer step alone."""
    teacher: str
    """Folder or hub id of the teacher."""
    student: str
    """Folder or hub id of the student."""
    task_path: str
    """Instructions, as --task instruct of run.py reads them."""
    rows: int = 8
    """Batch size."""
    new_tokens: int = 64
    """Tokens per completion."""
    steps: int = 2
    """Timed iterations, after one that is not timed."""
    chunk: int = 256
    """Positions whose logits are computed at a time in `update`."""
    micro_batch: int = 0
    """Completions in one forward and backward pass of an agent's update; 0 for all."""
    threads: int = 2
    """Threads of torch."""


def peak_mib() -> float:
    """The largest resident memory of this process so far, MiB.

    On Linux `getrusage` is not used: it includes the memory of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def ours(config: PeerConfig) -> dict[str, Any]:
    """Iterations of rkl, or of gated at a tau that makes about 5 % of the positions hard."""
    from experiments.benchmarking.iterations import with_tau
    from experiments.benchmarking.rollouts import Rollouts, run_config
    from experiments.running.build import make_env, make_student

    benchmark = BenchmarkConfig(config.teacher, config.student, config.task_path, new_tokens=config.new_tokens)
    tau = Rollouts(benchmark, config.rows).tau_for(0.05) if config.name == "gated" else 1.0
    run = run_config(benchmark, config.rows, config.name)
    env = make_env(run, "train", config.rows, purpose="train")
    options = replace(with_tau(run.agent_options, tau), micro_batch=config.micro_batch)
    agent = DistillAgent(make_student(run, env), options)
    seconds: list[float] = []
    tokens: list[float] = []

    def callback(iteration: int, metrics: dict[str, float]) -> None:
        seconds.append(metrics["time/seconds"])
        tokens.append(metrics["rollout/tokens"])

    agent.learn(env, config.steps + 1, callback)
    return {"seconds": seconds[1:], "tokens": sum(tokens[1:])}


def teacher_only_rollout(prompts: Any, tokens: Any, teacher: Any) -> Rollout:
    """The student's tokens [n, t] with the teacher's distributions, and 0 for everything else."""
    zeros = torch.zeros(tokens.shape, dtype=torch.float64)
    return Rollout(
        prompts=list(prompts),
        tokens=tokens,
        rewritten=zeros > 0,
        rewards=zeros,
        token_log_prob=zeros,
        score=zeros,
        grades=zeros[:, 0],
        teacher=teacher,
        support=None,
    )


def update(config: PeerConfig) -> dict[str, Any]:
    """One update on completions of random tokens, four a pass, with the teacher's full distributions."""
    student = build_model(config.student)
    vocabulary = student.vocab_size
    task = InstructTask(config.task_path, config.teacher, max_prompt_tokens=128)
    n, t = config.rows, config.new_tokens
    prompts = [p for p in task.prompts("train") if len(p.ids) >= 40][:n]
    tokens = torch.randint(0, vocabulary, (n, t), generator=torch.Generator().manual_seed(0))
    teacher = torch.full((1, vocabulary), 1.0).log_softmax(-1).expand(n * t, vocabulary)  # takes no memory
    rollout = teacher_only_rollout(prompts, tokens, teacher)
    options = DistillConfig(method=METHODS["rkl"], batch_size=n, chunk_positions=config.chunk, micro_batch=4)
    agent = DistillAgent(student, replace(options, optimizer=OptimizerConfig(1e-9)))
    one = teacher_only_rollout(prompts[:1], tokens[:1, :2], teacher[:2])
    agent.update(one)  # the optimiser's moments and the gradient now exist
    before = peak_mib()
    started = time.perf_counter()
    agent.update(rollout)
    return {
        "rows": n,
        "tokens": t,
        "chunk": config.chunk,
        "update_mib": peak_mib() - before,
        "seconds": [time.perf_counter() - started],
    }


def trl(config: PeerConfig) -> dict[str, Any]:
    """Iterations of a TRL trainer with the same models, prompts, batch size, tokens and precision.

    The cache is on and gradient checkpointing off: TRL's defaults are much slower on a CPU.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    tokenizer = load_tokenizer(config.teacher)
    task = InstructTask(config.task_path, config.teacher, max_prompt_tokens=128)
    texts = [p.text for p in task.prompts("train")]
    student: Any = AutoModelForCausalLM.from_pretrained(config.student, dtype=torch.float32)
    teacher: Any = AutoModelForCausalLM.from_pretrained(config.teacher, dtype=torch.float32)
    shared: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": config.rows,
        "max_steps": config.steps + 1,
        "learning_rate": 1e-9,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "temperature": 1.0,
        "beta": 1.0,
    }
    user = [[{"role": "user", "content": text}] for text in texts]
    arguments: Any
    make: Any
    if config.name == "DistillationTrainer":
        from trl import DistillationConfig, DistillationTrainer

        make, data = DistillationTrainer, {"prompt": user}
        arguments = DistillationConfig(**shared, max_completion_length=config.new_tokens)
    else:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        make, data = GKDTrainer, {"messages": [[*u, {"role": "assistant", "content": "ok"}] for u in user]}
        arguments = GKDConfig(**shared, lmbda=1.0, max_new_tokens=config.new_tokens, max_length=512)
    trainer = make(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
    )
    seconds: list[float] = []

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    generated: list[int] = []
    generate = student.generate

    def counting(*args: Any, **kwargs: Any) -> Any:
        out = generate(*args, **kwargs)
        ids = out.sequences if hasattr(out, "sequences") else out
        answers = ids[:, kwargs["input_ids"].shape[1] :]
        ended = (answers == tokenizer.eos_token_id).int().cumsum(1)
        generated.append(int((ended == 0).sum() + (ended.max(1).values > 0).sum()))
        return out

    student.generate = counting
    trainer.add_callback(Clock())
    trainer.train()
    return {"seconds": seconds[1:], "tokens": sum(generated[1:])}


def main(config: PeerConfig) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    measure = {"update": update, "gated": ours, "rkl": ours}.get(config.name, trl)
    print(json.dumps(measure(config) | {"name": config.name, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main(tyro.cli(PeerConfig))
