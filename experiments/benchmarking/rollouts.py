"""The speed of rollouts, gated and ungated, against the cost model; and how often rounding changes a completion."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, get_args

import numpy as np
import torch

from agents.collector import collect
from agents.draft_length import DraftLength
from agents.rollout import Rollout
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import NEVER, Gate
from distill_env.randomness import episode_keys
from experiments.benchmarking.config import BenchmarkConfig, Dtype
from experiments.benchmarking.cost_model import best_length, blocks, blocks_in_turn, blocks_per_rollout, interpolated
from experiments.benchmarking.timing import alternate
from experiments.running.build import make_env, make_student
from experiments.running.config import RunConfig
from experiments.running.flags import parse


def run_config(config: BenchmarkConfig, rows: int, agent: str = "gated", dtype: Dtype = "float32") -> RunConfig:
    """A run on the benchmark's pair of models."""
    flags = ["--dtype", dtype, "--agent", agent, "--batch-size", str(rows), "--rows", str(rows), "--seed", "0"]
    if config.teacher:
        flags += ["--env", "lm", "--device", "cpu", "--teacher", config.teacher, "--student", config.student]
        flags += ["--task-path", config.task_path, "--max-new-tokens", str(config.new_tokens)]
        flags += ["--draft-limit", str(config.new_tokens), "--max-prompt-tokens", "128"]
    else:
        flags += ["--draft-limit", "21"]
    return parse(flags)


def rewritten_share(rollout: Rollout) -> float:
    return float(rollout.rewritten.sum() / rollout.mask.sum())


class Rollouts:
    """A pair of models, prompts, and the ways to write completions of them, as functions to be timed."""

    def __init__(self, config: BenchmarkConfig, rows: int, dtype: Dtype = "float32") -> None:
        self.run = run_config(config, rows, dtype=dtype)
        self.env: DistillVectorEnv = make_env(self.run, "train", rows, purpose="train")
        student: Any = make_student(self.run, self.env)
        student.model.to(getattr(torch, dtype))
        self.student = student
        self.rows, self.tokens = rows, self.env.max_new_tokens
        stride = max(1, len(self.env.prompts) // (4 * rows))
        self.prompts = list(self.env.prompts[::stride])[: 4 * rows]
        self.last: dict[str, Rollout] = {}

    def write(self, name: str, gate: Gate, length: DraftLength | int, batches: int = 1) -> None:
        """A rollout of `batches` batches with refilling, which is left in `last[name]`."""
        n = batches * self.rows
        keys = episode_keys(7, np.arange(n))
        self.last[name] = collect(self.env, self.student.fork(), self.prompts[:n], keys, gate, length)

    def tau_for(self, hard_rate: float) -> float:
        """A tau at which about this share of the positions is hard: the best of six gated rollouts.

        Gating changes which states are visited, so the quantile of D_t in an ungated rollout is only the first guess;
        bisection follows.
        """
        self.write("tau", Gate("divergence", 1e9), self.env.chunk)
        ungated = self.last["tau"]
        score = ungated.score[ungated.mask].numpy()
        low, high = 0.0, float(score.max())  # all positions are hard, none is
        tau = float(np.quantile(score, 1 - hard_rate))
        tried: dict[float, float] = {}  # tau to share
        for _ in range(6):
            self.write("tau", Gate("divergence", tau), 4)
            tried[tau] = rewritten_share(self.last["tau"])
            if abs(tried[tau] / hard_rate - 1) < 0.2:
                break
            low, high = (tau, high) if tried[tau] > hard_rate else (low, tau)
            tau = (low + high) / 2
        return min(tried, key=lambda tau: abs(np.log((tried[tau] + 1e-4) / hard_rate)))

    def generate(self) -> Callable[[], object]:
        """Transformers' own sampling with the same student, prompts and number of tokens."""
        ids = [p.ids for p in self.prompts[: self.rows]]
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(i)) + list(i) for i in ids])
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
        sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "use_cache": True}
        ends = {"max_new_tokens": self.tokens, "pad_token_id": 0, "eos_token_id": self.env.task.eos_token_id}
        return partial(self.student.model.generate, input_ids=padded, attention_mask=mask, **sampling, **ends)

    def block_times(self, widths: list[int], repetitions: int) -> tuple[float, float, list[float]]:
        """Median seconds in which both models read the prompts, of a student step, and of a teacher block of each
        width, in the middle of a completion."""
        ids = [p.ids for p in self.prompts[: self.rows]]
        half = self.tokens // 2
        filler = torch.randint(0, self.env.vocab_size, (self.rows, self.tokens))
        student, teacher = models = self.student.fork(), self.env.teacher.fork()  # type: ignore[attr-defined]

        def read() -> None:
            for model in models:
                model.start(ids)

        def block(model: Any, width: int) -> None:
            model.extend(filler[:, :width])
            model.rewind([half] * self.rows)

        (reading,) = alternate({"prompts": read}, repetitions).values()
        for model in models:
            model.extend(filler[:, :half])
        contenders = {"student": partial(block, student, 1)} | {str(w): partial(block, teacher, w) for w in widths}
        step, *blocks = map(median, alternate(contenders, max(5, repetitions)).values())
        return median(reading), step, blocks


def fixed_lengths(hard_rate: float, config: BenchmarkConfig) -> list[int]:
    """The fixed draft lengths that may be the best at this hard rate: at most one hard position on average."""
    return [1, *(k for k in config.lengths if k * hard_rate <= 1)]


def measure_rollouts(config: BenchmarkConfig, rows: int) -> dict[str, Any]:
    """Ungated, generated, and gated rollouts at several hard rates, against the cost model."""
    rollouts = Rollouts(config, rows)
    tokens = rollouts.tokens
    widths = [w for w in (1, 2, 4, 8, 16, 32) if w <= tokens - tokens // 2]
    prompts, step, seconds = rollouts.block_times(widths, config.repetitions)
    block = interpolated(widths, seconds)
    gates = {h: Gate("divergence", rollouts.tau_for(h)) for h in config.hard_rates}
    lengths = {name: DraftLength(tokens) for name in (*(f"adaptive {h}" for h in gates), "refilled")}
    work: dict[str, tuple[Gate, DraftLength | int, int]] = {"ungated": (NEVER, tokens, 1)}
    for h, gate in gates.items():
        work[f"adaptive {h}"] = gate, lengths[f"adaptive {h}"], 1
        work |= {f"{k} {h}": (gate, k, 1) for k in fixed_lengths(h, config)}
    work["refilled"] = gates[min(gates, key=lambda h: abs(h - 0.05))], lengths["refilled"], 4
    work["ungated refilled"] = NEVER, tokens, 4
    contenders = {name: partial(rollouts.write, name, *arguments) for name, arguments in work.items()}
    times = alternate(contenders | {"generate": rollouts.generate()}, config.repetitions)

    def adaptive(name: str) -> dict[str, Any]:
        """An adaptive rollout, and its seconds by the cost model: from the mean hard rate, from that of each
        completion, and from the positions that were hard."""
        rollout, chosen = rollouts.last[name], lengths[name].choose(rows)
        hard, tokens_each = rollout.rewritten.numpy(), rollout.mask.sum(1).numpy()
        counts = {
            "model": blocks_per_rollout(rewritten_share(rollout), chosen, tokens_each, rows),
            "model_by_answer": blocks_per_rollout(hard.sum(1) / tokens_each, chosen, tokens_each, rows),
            "replayed": blocks_in_turn(blocks(hard, tokens_each, chosen), rows),
        }
        reading, each = prompts * len(tokens_each) / rows, chosen * step + block(chosen)
        return {
            "hard_rate": rewritten_share(rollout),
            "tokens": int(rollout.mask.sum()),
            "chosen_length": chosen,
            **{key: reading + each * count for key, count in counts.items()},
        }

    gated = []
    for h, gate in gates.items():
        row, cost = adaptive(f"adaptive {h}"), rollouts.last[f"adaptive {h}"].cost
        row |= {"tau": gate.tau, "model_length": best_length(row["hard_rate"], tokens, step, block)}
        row |= {"adaptive": times[f"adaptive {h}"], "fixed": {k: times[f"{k} {h}"] for k in fixed_lengths(h, config)}}
        row |= {"passes": cost.teacher_passes, "passes_one_by_one": rollouts.last[f"1 {h}"].cost.teacher_passes}
        row |= {key: getattr(cost, key) for key in ("wasted", "student_seconds", "teacher_seconds")}
        gated.append(row)
    refilled = {"seconds": times["refilled"], "ungated": times["ungated refilled"], "answers": 4 * rows}
    return {
        **{"rows": rows, "tokens": tokens, "draft_limit": tokens, "student_step": step, "prompt_seconds": prompts},
        **{"block_widths": widths, "block_seconds": seconds, "ungated": times["ungated"]},
        **{"ungated_tokens": int(rollouts.last["ungated"].mask.sum()), "generate": times["generate"]},
        **{"gated": gated, "refilled": adaptive("refilled") | refilled},
    }


def measure_precision(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """How often drafts of eight differ from gating token by token, by rounding alone, in two number formats."""
    results = []
    for dtype in get_args(Dtype):
        rollouts = Rollouts(config, config.batch, dtype)
        gate = Gate("divergence", rollouts.tau_for(0.05))
        for k in (1, 8):
            rollouts.write(str(k), gate, k, 4)
        results.append({"dtype": dtype, **difference(rollouts.last["1"], rollouts.last["8"])})
    return results


def difference(a: Rollout, b: Rollout) -> dict[str, float]:
    """Completions that differ, tokens up to the first difference, and the teacher's total variation up to there."""
    parted, compared, variations = 0, 0, []
    width = min(a.tokens.shape[1], b.tokens.shape[1])
    differs = (a.tokens[:, :width] != b.tokens[:, :width]) | (a.rewritten[:, :width] != b.rewritten[:, :width])
    teachers = [r.teacher.double().exp().split(r.mask.sum(1).tolist()) for r in (a, b)]  # type: ignore[union-attr]
    for different, mask, p, q in zip(differs, a.mask, *teachers, strict=True):
        count = 1 + int(different.int().argmax() if different.any() else mask.sum() - 1)
        parted += bool(different.any())
        compared += count
        variations.append(0.5 * (p[:count] - q[:count]).abs().sum(-1))
    variation = torch.cat(variations)
    return {
        "answers": len(differs),
        "parted": parted,
        "tokens": compared,
        "mean_total_variation": float(variation.mean()),
        "largest_total_variation": float(variation.max()),
    }
