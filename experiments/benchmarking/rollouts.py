"""Rollouts, gated and ungated, against the cost model; and by how much rounding parts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from agents.collector import collect
from agents.draft_length import DraftLength
from agents.rollout import Rollout
from distill_env.env import DistillVectorEnv
from distill_env.gate import NEVER, Gate
from distill_env.models.base import TrainableModel
from distill_env.randomness import episode_keys
from experiments.benchmarking.cost_model import best_length, blocks, blocks_in_turn, blocks_per_rollout, interpolated
from experiments.benchmarking.timing import Config, Dtype, alternate, median
from experiments.running.config import AnyRun, make_env, make_student, parse


def run_config(config: Config, rows: int, agent: str = "gated", dtype: Dtype = "float32") -> AnyRun:
    flags = ["--dtype", dtype, "--agent", agent, "--batch-size", str(rows), "--rows", str(rows), "--seed", "0"]
    if config.teacher:
        flags += ["--env", "lm", "--teacher", config.teacher, "--student", config.student]
        flags += ["--task-path", config.task_path, "--max-new-tokens", str(config.new_tokens)]
        flags += ["--draft-limit", str(config.new_tokens), "--max-prompt-tokens", "128"]
    else:
        flags += ["--draft-limit", "21"]
    return parse(flags)


def rewritten_share(rollout: Rollout) -> float:
    return float(rollout.rewritten.sum() / rollout.mask.sum())


class Rollouts:
    """A pair of models, a batch of prompts, and the ways to write answers to them."""

    def __init__(self, config: Config, rows: int, dtype: Dtype = "float32") -> None:
        self.run = run_config(config, rows, dtype=dtype)
        self.env: DistillVectorEnv = make_env(self.run, "train", rows, purpose="train")
        student: Any = make_student(self.run, self.env)
        student.model.to(getattr(torch, dtype))
        self.student = student
        self.rows, self.tokens = rows, self.env.max_new_tokens
        stride = max(1, len(self.env.prompts) // (4 * rows))
        self.prompts = list(self.env.prompts[::stride])[: 4 * rows]
        self.used: dict[str, Rollout] = {}

    def write(self, name: str, writer: Gate, length: DraftLength | int, answers: int = 0) -> Callable[[], None]:
        """A contender; what it wrote last is kept under its name."""
        n = answers or self.rows
        keys = episode_keys(7, np.arange(n))
        student: TrainableModel = self.student.fork()

        def contender() -> None:
            self.used[name] = collect(self.env, student, self.prompts[:n], keys, writer, length)

        return contender

    def tau_for(self, hard_rate: float) -> float:
        """A threshold at which about this share of the steps is hard: the nearest of six gated rollouts.

        Gating changes which states are met, so that the quantile of D_t on ungated answers is only where to begin; the
        rest is bisection.
        """
        self.write("tau", Gate("divergence", 1e9), self.env.chunk)()
        ungated = self.used["tau"]
        score = ungated.score[ungated.mask].numpy()
        low, high = 0.0, float(score.max())  # everything is hard, nothing is
        tau = float(np.quantile(score, 1 - hard_rate))
        tried: dict[float, float] = {}  # threshold to share
        for _ in range(6):
            self.write("tau", Gate("divergence", tau), 4)()
            tried[tau] = rewritten_share(self.used["tau"])
            if abs(tried[tau] / hard_rate - 1) < 0.2:
                break
            low, high = (tau, high) if tried[tau] > hard_rate else (low, tau)
            tau = (low + high) / 2
        return min(tried, key=lambda tau: abs(np.log((tried[tau] + 1e-4) / hard_rate)))

    def generate(self) -> Callable[[], None]:
        """Transformers' own sampling with the same student, prompts and number of tokens."""
        ids = [p.ids for p in self.prompts[: self.rows]]
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(i)) + list(i) for i in ids])
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
        model = self.student.model

        def contender() -> None:
            model.generate(
                input_ids=padded,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=self.tokens,
                pad_token_id=0,
                eos_token_id=self.env.task.eos_token_id,
                use_cache=True,
            )

        return contender

    def prompt_seconds(self, repetitions: int) -> float:
        """Seconds in which both models read the prompts, which no rollout can do without; the median."""
        ids = [p.ids for p in self.prompts[: self.rows]]
        models = self.env.teacher.fork(), self.student.fork()  # type: ignore[attr-defined]
        return median(alternate({"prompts": lambda: [m.start(ids) for m in models]}, repetitions)["prompts"])

    def block_times(self, widths: list[int], repetitions: int) -> tuple[float, list[float]]:
        """Seconds of a student step, and of a teacher block of each width, at half of an answer; medians."""
        ids = [p.ids for p in self.prompts[: self.rows]]
        half = self.tokens // 2
        filler = torch.randint(0, self.env.vocab_size, (self.rows, self.tokens))
        teacher, student = self.env.teacher.fork(), self.student.fork()  # type: ignore[attr-defined]
        for model in (teacher, student):
            model.start(ids)
            model.extend(filler[:, :half])

        def block(model: Any, width: int) -> Callable[[], None]:
            def contender() -> None:
                model.extend(filler[:, :width])
                model.rewind([half] * self.rows)

            return contender

        contenders = {"student": block(student, 1)} | {str(w): block(teacher, w) for w in widths}
        seconds = alternate(contenders, max(5, repetitions))
        return median(seconds["student"]), [median(seconds[str(w)]) for w in widths]


def lengths_for(hard_rate: float, config: Config) -> list[int]:
    """The fixed draft lengths that may be the best at this hard rate: a draft meets one hard step at the most."""
    return [1, *(k for k in config.lengths if k * hard_rate <= 1)]


def measure_rollouts(config: Config, rows: int) -> dict[str, Any]:
    """Ungated, generated, and gated rollouts at several hard rates, against the cost model."""
    rollouts = Rollouts(config, rows)
    tokens = rollouts.tokens
    widths = [w for w in (1, 2, 4, 8, 16, 32) if w <= tokens - tokens // 2]
    step, seconds = rollouts.block_times(widths, config.repetitions)
    block = interpolated(widths, seconds)
    prompts = rollouts.prompt_seconds(config.repetitions)
    taus = {h: rollouts.tau_for(h) for h in config.hard_rates}
    contenders: dict[str, Callable[[], None]] = {
        "ungated": rollouts.write("ungated", NEVER, tokens),
        "generate": rollouts.generate(),
    }
    lengths: dict[float, DraftLength] = {}
    for h, tau in taus.items():
        gate = Gate("divergence", tau)
        lengths[h] = DraftLength(tokens)
        contenders[f"adaptive {h}"] = rollouts.write(f"adaptive {h}", gate, lengths[h])
        for k in lengths_for(h, config):
            contenders[f"{k} {h}"] = rollouts.write(f"{k} {h}", gate, k)
    refilled = DraftLength(tokens)
    middle = min(config.hard_rates, key=lambda h: abs(h - 0.05))
    contenders["refilled"] = rollouts.write("refilled", Gate("divergence", taus[middle]), refilled, 4 * rows)
    contenders["ungated refilled"] = rollouts.write("ungated refilled", NEVER, tokens, 4 * rows)
    times = alternate(contenders, config.repetitions)

    def model(name: str, length: int) -> dict[str, float]:
        """Seconds of this rollout by the cost model: by the share of hard steps of all answers, by that of each answer,
        and by the steps that were hard."""
        used = rollouts.used[name]
        hard, answers = used.rewritten.numpy(), used.mask.sum(1).numpy()
        counts = {
            "model": blocks_per_rollout(rewritten_share(used), length, answers, rows),
            "model_by_answer": blocks_per_rollout(hard.sum(1) / answers, length, answers, rows),
            "replayed": blocks_in_turn(blocks(hard, answers, length), rows),
        }
        reading, each = prompts * len(answers) / rows, length * step + block(length)
        return {key: reading + each * count for key, count in counts.items()}

    gated = []
    for h, tau in taus.items():
        used = rollouts.used[f"adaptive {h}"]
        chosen = lengths[h].choose(rows)
        gated.append(
            {
                "hard_rate": rewritten_share(used),
                "tau": tau,
                "chosen_length": chosen,
                "model_length": best_length(rewritten_share(used), tokens, step, block),
                "adaptive": times[f"adaptive {h}"],
                "fixed": {k: times[f"{k} {h}"] for k in lengths_for(h, config)},
                **model(f"adaptive {h}", chosen),
                "tokens": int(used.mask.sum()),
                "passes": used.ledger.teacher_passes,
                "passes_one_by_one": rollouts.used[f"1 {h}"].ledger.teacher_passes,
                "wasted": used.ledger.wasted,
                "student_seconds": used.ledger.student_seconds,
                "teacher_seconds": used.ledger.teacher_seconds,
            }
        )
    return {
        "rows": rows,
        "tokens": tokens,
        "draft_limit": tokens,
        "student_step": step,
        "prompt_seconds": prompts,
        "block_widths": widths,
        "block_seconds": seconds,
        "ungated": times["ungated"],
        "ungated_tokens": int(rollouts.used["ungated"].mask.sum()),
        "generate": times["generate"],
        "gated": gated,
        "refilled": {
            "hard_rate": rewritten_share(rollouts.used["refilled"]),
            "seconds": times["refilled"],
            "ungated": times["ungated refilled"],
            "answers": 4 * rows,
            "tokens": int(rollouts.used["refilled"].mask.sum()),
            "chosen_length": refilled.choose(rows),
            **model("refilled", refilled.choose(rows)),
        },
    }


def measure_precision(config: Config) -> list[dict[str, Any]]:
    """How often drafts of eight and token-by-token gating part by rounding alone, and how far the teacher's
    distributions at the states that they share are apart."""
    results = []
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        rollouts = Rollouts(config, config.batch, dtype)
        gate = Gate("divergence", rollouts.tau_for(0.05))
        for k in (1, 8):
            rollouts.write(str(k), gate, k, 4 * config.batch)()
        results.append({"dtype": dtype, **difference(rollouts.used["1"], rollouts.used["8"])})
    return results


def difference(a: Rollout, b: Rollout) -> dict[str, float]:
    """Answers that part, tokens up to there, and the teacher's total variation at the states before."""
    assert a.teacher is not None
    assert b.teacher is not None
    parted, compared, variations = 0, 0, []
    at = [torch.cat([torch.zeros(1, dtype=torch.long), r.mask.sum(1).cumsum(0)]) for r in (a, b)]
    width = min(a.tokens.shape[1], b.tokens.shape[1])
    differs = (a.tokens[:, :width] != b.tokens[:, :width]) | (a.rewritten[:, :width] != b.rewritten[:, :width])
    for i in range(len(a.prompts)):
        first = int(differs[i].int().argmax()) if differs[i].any() else int(a.mask[i].sum()) - 1
        parted += bool(differs[i].any())
        compared += first + 1
        rows = [
            r.teacher[o[i] : o[i] + first + 1].double()
            for r, o in zip((a, b), at, strict=True)
            if r.teacher is not None
        ]
        variations.append(0.5 * (rows[0].exp() - rows[1].exp()).abs().sum(-1))
    variation = torch.cat(variations)
    return {
        "answers": len(a.prompts),
        "parted": parted,
        "tokens": compared,
        "mean_total_variation": float(variation.mean()),
        "largest_total_variation": float(variation.max()),
    }
