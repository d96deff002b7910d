"""What does the gate cost? Every row measured side by side in one run, with alternating repetitions.

    python experiments/benchmark.py
    python experiments/benchmark.py --teacher PATH_OR_ID --student PATH_OR_ID --task-path FILE --parts rollout peers

Without a pair it takes that of Sums, with an untrained student. Writes tables (Markdown) and all numbers (JSON), from
which `experiments/cost_model.py` draws.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console

from agents.distill import DistillAgent
from agents.rollout import DraftLength, Rollout, collect
from distill_env.env import DistillVectorEnv
from distill_env.gate import NEVER, Gate
from distill_env.models import TrainableModel
from distill_env.randomness import episode_keys
from experiments.config import AnyRun, make_env, make_student, parse
from experiments.cost_model import best_length, interpolated, rollout_seconds

Part = Literal["rollout", "iteration", "environment", "precision", "memory", "peers"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Config:
    """Measure rollouts, iterations, the environment and memory."""

    teacher: str = ""
    """Folder or hub id; the pair of Sums if empty."""
    student: str = ""
    """Folder or hub id."""
    task_path: str = ""
    """Instructions for a pair of language models, as for --task instruct of run.py."""
    parts: tuple[Part, ...] = ("rollout", "iteration", "environment", "precision")
    """What is measured; `memory` and `peers` (TRL's trainers, extra `trl`) need a pair of language models."""
    rows: tuple[int, ...] = (8, 64)
    """Batch sizes of the rollouts."""
    batch: int = 8
    """Batch size of iterations, memory and peers."""
    new_tokens: int = 64
    """Tokens an answer; Sums has its own horizon."""
    hard_rates: tuple[float, ...] = (0.01, 0.05, 0.2, 0.5)
    """Shares of hard steps that tau is set for."""
    lengths: tuple[int, ...] = (2, 4, 8)
    """Fixed draft lengths that the adaptive one is compared with."""
    repetitions: int = 3
    """Alternating repetitions."""
    threads: int = 0
    """Torch threads; 0 leaves the default."""
    out: Path = Path("runs/benchmark")
    """Where .json and .md go."""


# ---------------------------------------------------------------------- timing


def alternate(contenders: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each contender, `repetitions` times, taking turns; one round before that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(repetitions + 1):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            if round_number > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> str:
    """`1.23 s (1.20-1.31)`: median, smallest and largest."""
    return f"{median(values):.3g} s ({min(values):.3g}-{max(values):.3g})"


# ---------------------------------------------------------------------- rollouts


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
        """A threshold at which about this share of the steps is hard, the nearest of four gated rollouts.

        Gating changes which states are met, so that the quantile of D_t on ungated answers is only where to begin.
        """
        self.write("tau", Gate("divergence", 1e9), self.env.chunk)()
        tried: dict[float, float] = {}  # threshold to share
        for _ in range(4):
            score = self.used["tau"].score[self.used["tau"].mask]
            tau = float(np.quantile(score.numpy(), 1 - hard_rate))
            if tau in tried:
                break
            self.write("tau", Gate("divergence", tau), 4)()
            tried[tau] = rewritten_share(self.used["tau"])
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
        for k in (1, *config.lengths):
            contenders[f"{k} {h}"] = rollouts.write(f"{k} {h}", gate, k)
    refilled = DraftLength(tokens)
    middle = min(config.hard_rates, key=lambda h: abs(h - 0.05))
    contenders["refilled"] = rollouts.write("refilled", Gate("divergence", taus[middle]), refilled, 4 * rows)
    times = alternate(contenders, config.repetitions)

    written = {name: int(r.mask.sum()) for name, r in rollouts.used.items()}
    gated = []
    for h, tau in taus.items():
        adaptive = rollouts.used[f"adaptive {h}"]
        measured = rewritten_share(adaptive)
        chosen = lengths[h].choose()
        fixed = {k: median(times[f"{k} {h}"]) for k in (1, *config.lengths)}
        gated.append(
            {
                "hard_rate": measured,
                "tau": tau,
                "chosen_length": chosen,
                "model_length": best_length(measured, tokens, step, block),
                "adaptive": median(times[f"adaptive {h}"]),
                "adaptive_all": times[f"adaptive {h}"],
                "one_by_one": fixed[1],
                "fixed": fixed,
                "model": prompts + rollout_seconds(measured, chosen, tokens, rows, step, block),
                "tokens": written[f"adaptive {h}"],
                "passes": adaptive.ledger.teacher_passes,
                "passes_one_by_one": rollouts.used[f"1 {h}"].ledger.teacher_passes,
                "wasted": adaptive.ledger.wasted,
                "student_seconds": adaptive.ledger.student_seconds,
                "teacher_seconds": adaptive.ledger.teacher_seconds,
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
        "ungated_tokens": written["ungated"],
        "generate": times["generate"],
        "gated": gated,
        "refilled": {
            "hard_rate": middle,
            "seconds": times["refilled"],
            "answers": 4 * rows,
            "tokens": written["refilled"],
            "chosen_length": refilled.choose(),
        },
    }


# ---------------------------------------------------------------------- rounding


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


# ---------------------------------------------------------------------- iterations, and their floor


def measure_iterations(config: Config) -> dict[str, Any]:
    """One whole iteration of gated (at 5 % hard steps) and of rkl, and the matrix work that rkl cannot avoid."""
    rollouts = Rollouts(config, config.batch)
    tau = rollouts.tau_for(0.05)
    contenders: dict[str, Callable[[], None]] = {}
    for name in ("gated", "rkl"):
        run = run_config(config, config.batch, name)
        options = run.options
        env = make_env(run, "train", config.batch, purpose="train")
        agent = DistillAgent(make_student(run, env), with_tau(options, tau))
        contenders[name] = lambda agent=agent, env=env: agent.learn(env, 1)  # type: ignore[misc]
    if config.teacher:
        contenders["floor"] = floor(rollouts)
    seconds = alternate(contenders, config.repetitions)
    return {"rows": config.batch, "tokens": rollouts.tokens, "seconds": seconds, "tau": tau}


def with_tau(options: Any, tau: float) -> Any:
    """The options with another threshold and a step size that leaves the student, and so the hard rate, as it is."""
    from dataclasses import replace

    return replace(options, method=replace(options.method, tau=tau), learning_rate=1e-9)


def floor(rollouts: Rollouts) -> Callable[[], None]:
    """The bare matrix work of an rkl iteration: decode with a cache, one teacher pass, one student pass and back."""
    from transformers import DynamicCache

    ids = [p.ids for p in rollouts.prompts[: rollouts.rows]]
    width, tokens = max(map(len, ids)), rollouts.tokens
    prompt = torch.randint(0, rollouts.env.vocab_size, (rollouts.rows, width))
    answer = torch.randint(0, rollouts.env.vocab_size, (rollouts.rows, tokens))
    whole = torch.cat([prompt, answer[:, :-1]], 1)
    student: Any = rollouts.student
    teacher: Any = rollouts.env.teacher
    cached = student._cache_name
    student_head, teacher_head = (m.model.get_output_embeddings() for m in (student, teacher))

    def contender() -> None:
        with torch.no_grad():
            cache = DynamicCache(config=student.model.config)
            hidden = student.model.base_model(input_ids=prompt, use_cache=True, **{cached: cache}).last_hidden_state
            student_head(hidden[:, -1:])
            for t in range(tokens - 1):
                one = student.model.base_model(input_ids=answer[:, t : t + 1], use_cache=True, **{cached: cache})
                student_head(one.last_hidden_state)
            read = teacher.model.base_model(input_ids=whole, use_cache=False).last_hidden_state
            teacher_head(read[:, width - 1 :])
        hidden = student.model.base_model(input_ids=whole, use_cache=False).last_hidden_state
        logits = student_head(hidden[:, width - 1 :])
        logits.backward(torch.ones_like(logits))
        student.model.zero_grad()

    return contender


# ---------------------------------------------------------------------- the environment alone


def measure_environment(config: Config) -> list[dict[str, float]]:
    """Steps a second of the toy environment and of CartPole, and the environment's share of PPO's time."""
    import gymnasium as gym

    results = []
    for rows in (1, 64, 1024):
        toy: Any = gym.make_vec("Distill/Categorical-v0", num_envs=rows)
        pole: Any = gym.make_vec("CartPole-v1", num_envs=rows, vectorization_mode="vector_entry_point")
        n = 200
        toy_actions = np.random.default_rng(0).integers(0, 7, (n, rows))
        pole_actions = np.random.default_rng(0).integers(0, 2, (n, rows))

        def steps(env: Any, actions: Any) -> Callable[[], None]:
            env.reset(seed=0)

            def contender() -> None:
                for action in actions:
                    env.step(action)

            return contender

        contenders = {"toy": steps(toy, toy_actions), "cartpole": steps(pole, pole_actions)}
        times = alternate(contenders, config.repetitions)
        results.append({"rows": rows, **{k: n * rows / median(v) for k, v in times.items()}})
    results[0]["ppo_share"] = ppo_share()
    return results


def ppo_share() -> float:
    """The share of PPO's time that the toy environment takes, 64 rows of Distill/Categorical-v0."""
    from agents.config import SB3Config
    from agents.sb3 import SB3Agent
    from distill_env.models.tabular import uniform

    env = DistillVectorEnv(64, "categorical", "markov", autoreset_mode="SameStep")
    inside = 0.0
    step = env.step

    def timed(actions: Any) -> Any:
        nonlocal inside
        started = time.perf_counter()
        result = step(actions)
        inside += time.perf_counter() - started
        return result

    env.step = timed  # type: ignore[method-assign]
    agent = SB3Agent(uniform(env.vocab_size), SB3Config(algorithm="ppo", batch_size=64))
    started = time.perf_counter()
    agent.learn(env, 20)
    return inside / (time.perf_counter() - started)


# ---------------------------------------------------------------------- memory and peers, in processes of their own


def child(config: Config, name: str, *arguments: object) -> dict[str, Any]:
    """One measurement in a fresh process, whose peak memory is its own."""
    command = [sys.executable, "-m", "experiments.peers", name, "--teacher", config.teacher]
    command += ["--student", config.student, "--task-path", config.task_path]
    command += ["--threads", str(torch.get_num_threads()), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"peers: {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_peers(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Iterations of ours and of TRL's trainers, taking turns."""
    names = ("gated", "rkl", "DistillationTrainer", "GKDTrainer")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(config.repetitions):
        for name in names:
            size = ("--rows", config.batch, "--new-tokens", config.new_tokens, "--steps", 2)
            results[name].append(child(config, name, *size))
    return results


def measure_memory(config: Config) -> list[dict[str, Any]]:
    """Peak memory of one update, above that of the loaded model, by batch, length and chunk."""
    sizes = [(4, 32, 256), (8, 32, 256), (16, 32, 256), (8, 64, 256), (16, 64, 256), (16, 64, 64), (16, 64, 1024)]
    return [
        child(config, "update", "--rows", rows, "--new-tokens", tokens, "--chunk", chunk)
        for rows, tokens, chunk in sizes
    ]


# ---------------------------------------------------------------------- the report


def main(config: Config) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    console = Console()
    results: dict[str, Any] = {
        "config": {k: str(v) for k, v in asdict(config).items()},
        "pair": f"{Path(config.teacher).parent.name}" if config.teacher else "Sums",
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    needs_pair = {"memory", "peers"} & set(config.parts)
    if needs_pair and not config.teacher:
        raise SystemExit(f"parts: {', '.join(sorted(needs_pair))}: need --teacher, --student and --task-path")
    measures: dict[Part, Callable[[], Any]] = {
        "rollout": lambda: [measure_rollouts(config, rows) for rows in config.rows],
        "iteration": lambda: measure_iterations(config),
        "environment": lambda: measure_environment(config),
        "precision": lambda: measure_precision(config),
        "memory": lambda: measure_memory(config),
        "peers": lambda: measure_peers(config),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        with console.status(f"measuring: {part}"):
            started = time.perf_counter()
            results[part] = measures[part]()
        console.print(f"{part}: {time.perf_counter() - started:.0f} s", highlight=False)
        config.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        config.out.with_suffix(".md").write_text("\n".join(lines(results)) + "\n")
    console.print(config.out.with_suffix(".md").read_text(), markup=False, highlight=False)


def lines(results: dict[str, Any]) -> list[str]:
    """The results as Markdown tables."""
    out = [
        f"# Benchmark: {results['pair']}",
        "",
        f"{results['threads']} threads, {results['machine']}, medians (smallest-largest) of alternating repetitions.",
    ]
    for part in results.get("rollout", []):
        ungated = median(part["ungated"])
        out += [
            "",
            f"## Rollouts: {part['rows']} rows, {part['tokens']} tokens",
            "",
            f"Ungated, one teacher pass at the end: {spread(part['ungated'])}. `generate`: {spread(part['generate'])}. "
            f"Both models read the prompts in {part['prompt_seconds']:.3g} s; a student step takes "
            f"{1e3 * part['student_step']:.1f} ms, a teacher block of "
            + ", ".join(f"{w}: {1e3 * s:.1f}" for w, s in zip(part["block_widths"], part["block_seconds"], strict=True))
            + " ms.",
            "",
            "| hard | adaptive K | seconds | over ungated | over cost model | over best fixed K | K = 1 | passes |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in part["gated"]:
            best = min(row["fixed"], key=row["fixed"].get)
            out.append(
                f"| {row['hard_rate']:.1%} | {row['chosen_length']} | {spread(row['adaptive_all'])} "
                f"| {row['adaptive'] / ungated:.2f} | {row['adaptive'] / row['model']:.2f} "
                f"| {row['adaptive'] / row['fixed'][best]:.2f} (K = {best}) | {row['one_by_one']:.3g} s "
                f"| {row['passes']} of {row['passes_one_by_one']} |"
            )
        refilled = part["refilled"]
        each = median(refilled["seconds"]) / refilled["answers"] * part["rows"]
        out += [
            "",
            f"With refilling, {refilled['answers']} answers through {part['rows']} rows at {refilled['hard_rate']:.0%} "
            f"hard: {spread(refilled['seconds'])}, {each:.3g} s for every {part['rows']} answers.",
        ]
    if "iteration" in results:
        part = results["iteration"]
        seconds = part["seconds"]
        out += ["", f"## One iteration: {part['rows']} answers of {part['tokens']} tokens", ""]
        out += ["| | seconds | over the floor |", "| --- | ---: | ---: |"]
        for name, values in seconds.items():
            ratio = f"{median(values) / median(seconds['floor']):.2f}" if "floor" in seconds else ""
            out.append(f"| {name} | {spread(values)} | {ratio} |")
    if "peers" in results:
        out += ["", "## Against TRL", "", "| | seconds an iteration | tokens a second | peak memory, MiB |"]
        out += ["| --- | ---: | ---: | ---: |"]
        for name, runs in results["peers"].items():
            seconds = [s for run in runs for s in run["seconds"]]
            rate = median([run["tokens"] / sum(run["seconds"]) for run in runs])
            out.append(
                f"| {name} | {spread(seconds)} | {rate:.1f} | {median([run['peak_mib'] for run in runs]):,.0f} |"
            )
    if "precision" in results:
        out += ["", "## Rounding: K = 8 against K = 1", "", "| | answers that part | of tokens | mean, largest TV |"]
        out += ["| --- | ---: | ---: | ---: |"]
        for row in results["precision"]:
            share = f"{row['parted']} of {row['answers']} | {row['parted'] / row['tokens']:.2%} of {row['tokens']:,}"
            apart = f"{row['mean_total_variation']:.2g}, {row['largest_total_variation']:.2g}"
            out.append(f"| {row['dtype']} | {share} | {apart} |")
    if "memory" in results:
        out += ["", "## Memory of one update", "", "| rows | tokens | chunk, positions | above the model, MiB |"]
        out += ["| ---: | ---: | ---: | ---: |"]
        for row in results["memory"]:
            out.append(f"| {row['rows']} | {row['tokens']} | {row['chunk']} | {row['update_mib']:,.0f} |")
    if "environment" in results:
        out += ["", "## The environment alone", "", "| rows | toy steps/s | CartPole-v1 steps/s |"]
        out += ["| ---: | ---: | ---: |"]
        for row in results["environment"]:
            out.append(f"| {row['rows']} | {row['toy']:,.0f} | {row['cartpole']:,.0f} |")
        share = results["environment"][0]["ppo_share"]
        out += ["", f"The environment takes {share:.1%} of the time of PPO on the table with 64 rows."]
    return out


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
