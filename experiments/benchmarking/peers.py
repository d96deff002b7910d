"""Iterations of agents and of TRL's on-policy trainers, and single updates, each in a process of its own: a process's
peak memory is then that of the measurement."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.methods import METHODS
from agents.rollout import Rollout
from distill_env.models.hub import load_tokenizer
from distill_env.models.load import build_model
from distill_env.tasks.instruct import InstructTask
from experiments.benchmarking.config import BenchmarkConfig
from experiments.benchmarking.iterations import HARD_RATE, make_contender
from experiments.benchmarking.rollouts import Rollouts

ITERATIONS = 3  # of which the first is not timed
GLIBC = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


def measure_peers(config: BenchmarkConfig) -> dict[str, list[dict[str, Any]]]:
    """Iterations of our agents, also with micro-batches of two completions, and of TRL's trainers, alternating."""
    ours = itertools.product((0, 2), ("gated", "rkl"))
    contenders: dict[str, tuple[Any, ...]] = {
        f"{name}, micro-batch {size}" if size else name: (agent_iterations, config, name, size) for size, name in ours
    }
    contenders |= {name: (trl_iterations, config, name) for name in ("DistillationTrainer", "GKDTrainer")}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(config.repetitions):
        for name, call in contenders.items():
            results[name].append(in_new_process(*call))
    return results


def measure_memory(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """Peak memory of one update, above that of the loaded model, by batch, length and chunk.

    Two variables make glibc return every large block to the system at once: otherwise unused blocks are counted, too.
    """
    sizes = [(4, 64, 64), (8, 64, 64), (16, 64, 64), (32, 64, 64), (8, 32, 64), (16, 64, 128), (16, 64, 256)]
    with patch.dict(os.environ, GLIBC):
        return [
            in_new_process(one_update, replace(config, batch=rows, new_tokens=tokens), chunk)
            for rows, tokens, chunk in sizes
        ]


def in_new_process(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of a measurement, with `peak_mib`, the largest memory of its process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_seeded, torch.get_num_threads(), measure, *arguments).result()


def _seeded(threads: int, measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return measure(*arguments) | {"peak_mib": peak_mib()}


def peak_mib() -> float:
    """The largest resident memory of this process so far, MiB.

    On Linux `getrusage` is not used: it includes the memory of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def agent_iterations(config: BenchmarkConfig, name: str, micro_batch: int) -> dict[str, Any]:
    """Iterations of rkl, or of gated at a tau that makes about 5 % of the positions hard."""
    tau = Rollouts(config, config.batch).tau_for(HARD_RATE) if name == "gated" else 1.0
    agent, env = make_contender(config, name, tau, micro_batch)
    logged: list[dict[str, float]] = []
    agent.learn(env, ITERATIONS, lambda _, metrics: logged.append(metrics))
    return {
        "seconds": [metrics["time/seconds"] for metrics in logged[1:]],
        "tokens": sum(metrics["rollout/tokens"] for metrics in logged[1:]),
    }


def one_update(config: BenchmarkConfig, chunk: int) -> dict[str, Any]:
    """One update on completions of random tokens, four a pass, with the teacher's full distributions."""
    student = build_model(config.student)
    task = InstructTask(config.task_path, config.teacher, max_prompt_tokens=128)
    n, t, vocabulary = config.batch, config.new_tokens, student.vocab_size
    prompts = [p for p in task.prompts("train") if len(p.ids) >= 40][:n]
    tokens = torch.randint(0, vocabulary, (n, t), generator=torch.Generator().manual_seed(0))
    teacher = torch.full((1, vocabulary), 1.0).log_softmax(-1).expand(n * t, vocabulary)  # takes no memory

    def rollout(rows: int, length: int) -> Rollout:
        """The first of the tokens with the teacher's distributions, and 0 for everything else."""
        zeros = torch.zeros((rows, length), dtype=torch.float64)
        measured: dict[str, Any] = dict.fromkeys(("rewards", "token_log_prob", "score"), zeros)
        written: dict[str, Any] = {"prompts": prompts[:rows], "tokens": tokens[:rows, :length], "rewritten": zeros > 0}
        scored = teacher[: rows * length]
        return Rollout(**written, **measured, grades=zeros[:, 0], teacher=scored, support=None)

    options = DistillConfig(METHODS["rkl"], OptimizerConfig(1e-9), batch_size=n, chunk_positions=chunk, micro_batch=4)
    agent = DistillAgent(student, options)
    agent.update(rollout(1, 2))  # the optimiser's moments and the gradient now exist
    before, started = peak_mib(), time.perf_counter()
    agent.update(rollout(n, t))
    seconds = [time.perf_counter() - started]
    return {"rows": n, "tokens": t, "chunk": chunk, "update_mib": peak_mib() - before, "seconds": seconds}


def trl_iterations(config: BenchmarkConfig, name: str) -> dict[str, Any]:
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
    options: dict[str, Any] = {
        **{"per_device_train_batch_size": config.batch, "max_steps": ITERATIONS, "learning_rate": 1e-9},
        **{"temperature": 1.0, "beta": 1.0, "gradient_checkpointing": False, "bf16": False},
        **{"use_cpu": not torch.cuda.is_available(), "output_dir": tempfile.mkdtemp(), "report_to": []},
        **{"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True},
    }
    user = [[{"role": "user", "content": text}] for text in texts]
    arguments: Any
    make: Any
    if name == "DistillationTrainer":
        from trl import DistillationConfig, DistillationTrainer

        make, data = DistillationTrainer, {"prompt": user}
        arguments = DistillationConfig(**options, max_completion_length=config.new_tokens)
    else:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        make, data = GKDTrainer, {"messages": [[*u, {"role": "assistant", "content": "ok"}] for u in user]}
        arguments = GKDConfig(**options, lmbda=1.0, max_new_tokens=config.new_tokens, max_length=512)
    models = {"model": student, "teacher_model": teacher, "processing_class": tokenizer}
    trainer = make(**models, args=arguments, train_dataset=Dataset.from_dict(data))
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
        written = ids[:, kwargs["input_ids"].shape[1] :]
        ended = (written == tokenizer.eos_token_id).int().cumsum(1)
        generated.append(int((ended == 0).sum() + (ended.max(1).values > 0).sum()))
        return out

    student.generate = counting
    trainer.add_callback(Clock())
    trainer.train()
    return {"seconds": seconds[1:], "tokens": sum(generated[1:])}
