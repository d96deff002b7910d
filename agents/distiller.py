"""Distillation from Python: two language models and data become a trained student.

from agents.distiller import Distiller

distiller = Distiller("models/student", "models/teacher", "chats.jsonl", method="gated", budget=0.1)
distiller.train(100)
distiller.save("student")
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from agents import cards, loading, methods, pair
from agents.assisted import tau_for_share, write_assisted
from agents.atomic_io import write_folder
from agents.base import Metrics
from agents.config import EVALUATION_SEED, DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.evaluation import evaluate
from agents.methods import Method, variant
from agents.prompts import OwnPrompts, evenly_spaced
from agents.rollout import completions_of
from distill_env.checks import errors_name_flags
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import ALWAYS, NEVER, Gate
from distill_env.rendering import marked_text
from distill_env.tasks.base import Split
from distill_env.tasks.registry import task_arguments, task_class
from distill_env.tasks.sources import Data

ROWS = 16  # completions at a time, except in training
MEASURED = 48  # completions by which the threshold of a budget is measured
REWRITES = {"rewrite", "rewrite_top_p", "rewrite_temperature", "rewrite_span", "rewrite_cost"}
ENVIRONMENT = REWRITES | {"max_new_tokens", "log_prob_floor", "task_reward"}


class Sample(NamedTuple):
    """A completion of the training, as text."""

    prompt: str
    completion: str
    marked: str  # the completion with the teacher's tokens between ⟦ and ⟧


Callback = Callable[[int, Metrics, list[Sample]], None]
"""Called after every iteration with its number, from 1, its metrics (see `agents.base.Callback`) and a few of its
completions. An exception ends the training."""


class Distiller:
    """A student, its teacher and their data.

    Args:
        student: what learns: a folder, a hub id, or a Transformers model, which is trained in place and never copied.
        teacher: the same, the URL of a completions server, or "self" for the student as it is now. It does not change,
            unless `refresh_teacher` says so.
        data: a path or hub id, a list of dicts, a `datasets.Dataset`, or these by split; docs/your_data.md lists the
            columns.
        method: a row of `agents/methods.py` by its name, or a `Method`. A row whose gate reads D_t has tau auto here:
            the first call of `train` chooses it.
        task: how the data are read: `instruct`, `text`, `gsm8k`, ..., or `package.module:Class`.
        tokenizer: of both models, or its folder or hub id; by default those of the models' folders, which have to be
            the same.
        peft_config: a `peft.LoraConfig`; this adapter of the student alone is trained.
        callbacks: called after every iteration; see `Callback`.
        device: of the models that are loaded here; auto is CUDA if available, else the CPU.
        dtype: of the teacher's weights; auto is bfloat16 on a GPU, else float32.
        student_dtype: the same of the student.
        options: called as the flags of `experiments/run.py`: fields of `Method`, `Gate`, `OptimizerConfig` and
            `DistillConfig`, such as `tau`, `budget`, `learning_rate`, `batch_size` and `seed`; arguments of the
            environment, such as `max_new_tokens`, and of the task, such as `max_prompt_tokens`; how models are loaded,
            such as `lora_rank`, `quantize` and `teacher_top_k`; `rows` and `draft_limit` of the rollout.

    Attributes:
        agent: the `DistillAgent`.
        env: the environment that it is trained in.
        task: the task; it has the tokenizer.
        history: the metrics of every iteration.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: in one line that names the argument, for a value that cannot be used.
        OSError: if a model cannot be loaded.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        data: Data,
        method: str | Method = "gated",
        *,
        task: str = "instruct",
        tokenizer: Any = None,
        peft_config: Any = None,
        callbacks: Iterable[Callback] = (),
        device: str = "auto",
        dtype: str = "auto",
        student_dtype: str = "auto",
        **options: Any,
    ) -> None:
        kind = task_class(task)
        own = _by_home(options, _usual(task, student, device), task_arguments(kind))
        with errors_name_flags({"agent": "method"}):
            row = method if isinstance(method, Method) else methods.for_new_pair(methods.method(method))
        config = DistillConfig(variant(row, **own["method"]), OptimizerConfig(**own["optimizer"]), **own["agent"])
        self._pair = loading.load_pair(
            student,
            teacher,
            tokenizer,
            device=device,
            dtype=dtype,
            student_dtype=student_dtype,
            seed=config.seed,
            peft_config=peft_config,
            options=own["loading"],
        )
        returned = getattr(self._pair.teacher, "top_k", 0)
        config = replace(config, method=methods.truncated(config.method, returned, loading.name_of(teacher)))
        here = {"tokenizer": self._pair.tokenizer, "path": data, "vocab_size": self._pair.student.vocab_size}
        here["references"] = config.method.teacher_writes == "reference"
        here |= pair.values_of(own["environment"], "max_new_tokens")  # the length of a text's passages
        accepted = pair.values_of(here, *task_arguments(kind))
        with errors_name_flags({"path": "data"}):
            self.task: Any = kind(**accepted, **own["task"])
        self._environment, self._draft_limit = own["environment"], own["rollout"].get("draft_limit", pair.DRAFT_LIMIT)
        self.env = self._make_env(own["rollout"].get("rows") or config.batch_size)
        self.agent = DistillAgent(self._pair.student, config)
        self.callbacks, self.history = [*callbacks], list[Metrics]()
        self._names = {"student": loading.name_of(student), "teacher": loading.name_of(teacher)}
        self._names["method"] = method if isinstance(method, str) else "a method of your own"

    def _make_env(
        self, rows: int, split: Split = "train", *, task: Any = None, teacher: bool = True, **arguments: Any
    ) -> DistillVectorEnv:
        """An environment for whole drafts; it shares the models' weights."""
        usual = {"chunk": self._draft_limit, "reveal_teacher": False, "autoreset_mode": "Disabled"}
        given = usual | self._environment | arguments
        return DistillVectorEnv(rows, task or self.task, self._pair.teacher if teacher else None, split, **given)

    def train(self, iterations: int = 100) -> Distiller:
        """Train for that many more iterations, one batch and one step of the optimiser each. Returns itself."""
        self.agent.learn(self.env, iterations, self._after_iteration)
        return self

    def _after_iteration(self, iteration: int, metrics: Metrics) -> None:
        self.history.append(metrics)
        if self.callbacks:
            samples = [
                Sample(c.prompt.text, self.task.decode(c.tokens), marked_text(self.task, c.tokens, c.rewritten))
                for c in self.agent.written
            ]
            for callback in self.callbacks:
                callback(iteration, metrics, samples)

    def evaluate(self, split: Split = "test", prompts: int = 32, samples: int = 1) -> Metrics:
        """What the student writes alone, and how far it is from its teacher: see `agents.evaluation.evaluate`.

        Args:
            split: of the data.
            prompts: at most so many, evenly spaced in the split.
            samples: completions of each.
        """
        every = self.task.prompts(split)
        if not every:
            raise ValueError(f"split: {split!r} has no prompts; expected another split of the data")
        chosen = evenly_spaced(every, min(prompts, len(every)))
        rows = min(ROWS, len(chosen) * samples)
        env = self._make_env(rows, split, chunk=1, reveal_teacher=True)
        gate = None if self.agent.method.gate.tau == "auto" else self.agent.method.hard_gate
        return evaluate(self.agent, env, chosen, samples, EVALUATION_SEED, gate)[0]

    def generate(
        self,
        prompts: str | Sequence[Any],
        ask: Literal["budget", "tau"] | None = None,
        *,
        budget: float = 0.1,
        max_new_tokens: int | None = None,
        seed: int = EVALUATION_SEED,
        mark: bool = False,
    ) -> list[str]:
        """A completion of each prompt, by the student alone or with its teacher on call.

        Args:
            prompts: texts, conversations (lists of messages with role and content) or rows as in the data.
            ask: None lets the student write alone; with "budget" the teacher writes about this share of the tokens,
                those with the largest score of the method's gate; with "tau" those where it reaches the method's tau.
            budget: the share, in [0, 1]. Its threshold is measured on validation prompts.
            max_new_tokens: by default as in training.
            seed: of the draws.
            mark: put the teacher's tokens between ⟦ and ⟧.
        """
        if not 0 <= budget <= 1:
            raise ValueError(f"budget: {budget}; expected a share in [0, 1]")
        if ask not in (None, "budget", "tau"):
            raise ValueError(f"ask: {ask!r}; expected None, budget or tau")
        asked = [prompts] if isinstance(prompts, str) else prompts
        own = self.task.make_prompts([self._as_example(x) for x in asked])
        if not own:
            return []
        method, student = self.agent.method, self.agent.student.fork()
        gate: Gate = NEVER
        if ask == "tau":
            if method.gate.tau == "auto":
                raise ValueError("ask: 'tau' before the training has chosen tau; expected 'budget', or a call of train")
            gate = method.hard_gate
        elif ask == "budget" and budget:
            gate = ALWAYS if budget == 1 else self._gate_for(budget)
        arguments: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        task = OwnPrompts(self.task, own)
        env = self._make_env(min(ROWS, len(own)), task=task, teacher=not gate.never, **arguments)
        rollout = write_assisted(env, student, own, gate, seed, method.top_k, method.top_p)
        if mark:
            return [marked_text(self.task, c.tokens, c.rewritten) for c in completions_of(rollout)]
        return [self.task.decode(c.tokens) for c in completions_of(rollout)]

    def _as_example(self, prompt: Any) -> Any:
        """A text as it is, a conversation or a row as the task reads it."""
        if isinstance(prompt, str):
            return prompt
        row = {"messages": list(prompt)} if isinstance(prompt, list | tuple) else prompt
        if not isinstance(row, Mapping):
            raise ValueError(f"prompts: {type(prompt).__name__}; expected a text, a conversation or a row")
        try:
            return self.task.read_row(dict(row)).examples[-1]
        except ValueError as error:
            raise ValueError(f"prompts: {error}") from None

    def _gate_for(self, budget: float) -> Gate:
        """The method's gate at the threshold for this share."""
        method, split = self.agent.method, self._held_out
        prompts = evenly_spaced(self.task.prompts(split), MEASURED)
        env = self._make_env(ROWS, split)
        usual = (self.agent.student.fork(), prompts, budget, EVALUATION_SEED + 1, method.hard_gate)
        return method.with_tau(tau_for_share(env, *usual, method.top_k, method.top_p)).hard_gate

    @property
    def _held_out(self) -> Split:
        return "validation" if self.task.prompts("validation") else "train"

    def save(self, path: str | Path) -> None:
        """Write a folder that Transformers loads: weights, an adapter merged into them, tokenizer and model card."""
        student: Any = self.agent.student
        gate = self.agent.method.gate
        tau = gate.tau if gate.tau == "auto" else f"{gate.tau:.4g}"
        settings = {"iterations": self.agent.iteration, "score": gate.score, "tau": tau}
        settings |= {"seed": self.agent.config.seed, "batch_size": self.agent.config.batch_size}

        def write(folder: Path) -> None:
            getattr(student, "export", student.save_pretrained)(folder)
            self.task.tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(cards.card(Path(path), **self._names, settings=settings))

        write_folder(path, write)


def _usual(task: str, student: Any, device: str) -> dict[str, Any]:
    """The options where nothing else is said."""
    if not isinstance(student, str | Path):
        device = str(getattr(student, "device", "cpu"))
    prompt, completion = pair.usual_lengths(pair.automatic_device() if device == "auto" else device)
    horizon = {"max_new_tokens": completion} if task in pair.READS_DATA else {}
    usual = {"batch_size": pair.BATCH_SIZE, "learning_rate": pair.LEARNING_RATE, "max_prompt_tokens": prompt}
    return usual | horizon


def _by_home(options: Mapping[str, Any], usual: Mapping[str, Any], task: set[str]) -> dict[str, dict[str, Any]]:
    """The options, and the usual ones, by where they belong; `task` are the arguments of the task.

    Raises:
        TypeError: for an option that belongs nowhere.
    """
    homes = {
        "method": _names(Method) | _names(Gate) - {"gate"},
        "optimizer": _names(OptimizerConfig),
        "agent": _names(DistillConfig) - {"method", "optimizer"},
        "environment": ENVIRONMENT,
        "task": task - {"tokenizer", "path", "vocab_size"},
        "rollout": {"rows", "draft_limit"},
        "loading": {*loading.OPTIONS},
    }
    own: dict[str, dict[str, Any]] = {home: {} for home in homes}
    for name, value in {**usual, **options}.items():
        home = next((home for home, names in homes.items() if name in names), None)
        if home is not None:
            own[home][name] = value
        elif name in options:
            near = difflib.get_close_matches(name, sorted(set().union(*homes.values())), 3)
            raise TypeError(f"{name}: unknown; expected {' or '.join(near) or 'an option that docs/python.md lists'}")
    return own


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}
