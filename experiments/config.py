"""The configuration of a run, and what it builds: environments, students, agents. Light to import."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from agents.config import DistillConfig, PluginConfig, SB3Config
from agents.methods import METHODS, Method, check_cacheable
from distill_env.tasks import Split

if TYPE_CHECKING:
    from agents.base import Agent
    from distill_env.env import DistillVectorEnv
    from distill_env.models import TrainableModel

LanguageTaskName = Literal["instruct", "gsm8k", "math", "aime", "svamp", "text"]
EnvName = Literal["sums", "coins", "categorical", "lm"]
SMALL_TASKS = ("sums", "coins")  # with a trained teacher that ships with the project
SB3_AGENTS: dict[str, Literal["ppo", "a2c"]] = {"ppo": "ppo", "a2c": "a2c"}
AGENT_HELP = f"A method ({', '.join(METHODS)}), ppo or a2c from Stable-Baselines3, or package.module:Class."
CATEGORICAL_VOCABULARY = 6


@dataclass(frozen=True)
class RunConfig:
    """Train a student with its teacher in the environment."""

    agent: Annotated[str, tyro.conf.arg(help=AGENT_HELP)] = "gated"
    env: EnvName = "sums"
    """Sums or coins with their shipped teachers, a categorical table, or any pair of causal language models."""
    teacher: str = ""
    """Teacher of --env lm: a folder or hub id."""
    student: str = ""
    """Student to begin with: a folder or hub id; for the other environments a fresh one if empty."""
    task: LanguageTaskName = "instruct"
    """Task of --env lm."""
    task_path: str = ""
    """Its data: a file (.jsonl, .json, .csv, .parquet, .txt), a folder with train, validation or test in the names of
    such, or a hub id; by default the data set of that name on the hub (not for instruct)."""
    few_shot: int = 0
    """So many solved examples of its train split before each question."""
    chat: Literal["auto", "yes", "no"] = "auto"
    """Whether prompts are put into the tokenizer's chat template; auto: if it has one."""
    step_pattern: str = ""
    """A token whose own text this regular expression matches ends a reasoning step; by default a newline does."""
    max_prompt_tokens: int = 256
    """Prompts of --env lm that are longer are left out."""
    name: str = ""
    """The run's folder under --out; by default agent, environment and seed."""
    out: Path = Path("runs")
    """Where runs go."""
    resume: bool = False
    """Go on with the run of this name from its last checkpoint."""
    iterations: int = 400
    """Iterations: one batch of answers and one optimiser step each."""
    limit: float = 0.0
    """End the training once so much of --limit-of is used, if that is before the last iteration; 0 sets no limit."""
    limit_of: Literal["student_tokens", "teacher_positions", "teacher_tokens"] = "student_tokens"
    """What is counted: tokens the student wrote, positions the teacher scored, or tokens the teacher wrote."""
    warm_start: float = 1 / 3
    """Before training, sft until the validation accuracy is this share of the teacher's (sums, coins); 0 for none."""
    student_width: int = 16
    """Hidden width of a fresh student of sums or coins, a multiple of 4; 24 by default for coins."""
    student_layers: int = 2
    """Layers of a fresh student of sums or coins."""
    student_mlp: int = 32
    """Width of its feed-forward layers; 32 is from docs/results/student_sweep.md, for coins the default is 48."""
    max_new_tokens: int | None = None
    """Horizon in tokens; the task's default if not given."""
    rewrite: Literal["sample", "nucleus", "argmax"] = "sample"
    """How the teacher writes."""
    rewrite_top_p: float = 0.9
    """Mass of the nucleus."""
    rewrite_span: Literal["token", "step"] = "token"
    """How much the teacher writes at a time: one token, or the rest of the reasoning step."""
    rewrite_cost: float | None = None
    """Price of a rewrite in nats; tau if not given."""
    log_prob_floor: float = -100.0
    """Lowest reward of an own token, nats."""
    task_reward: float = 0.0
    """Weight of the grade in the last reward; needs gamma > 0."""
    rows: int = 0
    """Answers written at a time, at most the batch size; a row that ends one begins the next of the batch, which stays
    the same. With --micro-batch this is gradient accumulation. 0 for the batch size."""
    draft_limit: int = 16
    """The longest draft."""
    validate_every: int = 10
    """Iterations between validations of the student alone."""
    checkpoint_every: int = 50
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """The last checkpoints that stay on disk."""
    eval_prompts: int = 200
    """Prompts in the final evaluation, per split."""
    eval_samples: int = 8
    """Answers to each of them."""
    threads: int = 0
    """Torch threads; 0 leaves the default."""
    track: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Who is told the metrics besides metrics.csv; wandb and trackio are extras to be installed."""
    push_to_hub: str = ""
    """Hub repository, user/name, that the student is pushed to at the end; the token is $HF_TOKEN or the stored one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights of a teacher that is a language model."""
    student_dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights of a student that is a language model, in which it computes and is saved; in bfloat16 the optimiser keeps
    and steps on float32 copies."""
    teacher_cache: str = ""
    """Folder in which the teacher's answers are kept, and read by later runs at no cost; for methods whose answers do
    not depend on the student. A file holds its distributions: large ones without --top-k."""

    def __post_init__(self) -> None:
        for name in ("validate_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not at least 1")


# what differs from the fields above, by environment
ENV_DEFAULTS: dict[str, dict[str, Any]] = {
    "sums": {},
    "coins": {"student_width": 24, "student_mlp": 48},
    "categorical": {"iterations": 150, "warm_start": 0.0, "eval_samples": 32},
    "lm": {
        "iterations": 20,
        "warm_start": 0.0,
        "max_new_tokens": 48,
        "eval_prompts": 32,
        "eval_samples": 2,
        "checkpoint_every": 5,
    },
}
OPTION_DEFAULTS: dict[str, dict[str, Any]] = {
    "sums": {"batch_size": 64, "learning_rate": 2e-3},
    "coins": {"batch_size": 64, "learning_rate": 2e-3},
    "categorical": {"batch_size": 32, "learning_rate": 0.05},
    "lm": {"batch_size": 8, "learning_rate": 1e-4},
}
# 0 adapts it. Fixed on the small tasks, so that a run repeats itself: an adapted length follows a clock, and blocks of
# another length round otherwise.
DRAFT_LENGTH = {"sums": 6, "coins": 6, "categorical": 6, "lm": 0}


def default_options(agent: str, env: str) -> Any:
    """The options of an agent in an environment, as a dataclass whose fields are flags.

    Raises:
        ValueError: for an unknown agent or environment.
    """
    if env not in ENV_DEFAULTS:
        raise ValueError(f"env: {env!r} is unknown; accepted: {', '.join(ENV_DEFAULTS)}")
    if agent in METHODS:
        return DistillConfig(method=METHODS[agent], draft_length=DRAFT_LENGTH[env], **OPTION_DEFAULTS[env])
    if agent in SB3_AGENTS:
        return SB3Config(algorithm=SB3_AGENTS[agent], **OPTION_DEFAULTS[env])
    if ":" in agent:
        return PluginConfig(batch_size=OPTION_DEFAULTS[env]["batch_size"])
    accepted = ", ".join([*METHODS, *SB3_AGENTS])
    raise ValueError(f"agent: {agent!r} is unknown; accepted: {accepted}, or package.module:Class")


# one class for each kind of options, since flags follow from types
@dataclass(frozen=True)
class DistillRun(RunConfig):
    options: DistillConfig = field(default_factory=DistillConfig)


@dataclass(frozen=True)
class SB3Run(RunConfig):
    options: SB3Config = field(default_factory=SB3Config)


@dataclass(frozen=True)
class PluginRun(RunConfig):
    options: PluginConfig = field(default_factory=PluginConfig)


AnyRun = DistillRun | SB3Run | PluginRun
RUN_CLASSES: dict[type, type[AnyRun]] = {DistillConfig: DistillRun, SB3Config: SB3Run, PluginConfig: PluginRun}
# what a resumed run may change
RESUMABLE = {"resume", "iterations", "validate_every", "checkpoint_every", "eval_prompts", "eval_samples", "threads"}
RESUMABLE |= {"keep_checkpoints", "track", "push_to_hub", "teacher_cache"}


@dataclass(frozen=True)
class Choice:
    """The flags that decide which other flags there are."""

    agent: str = "gated"
    env: str = "sums"
    name: str = ""
    out: Path = Path("runs")
    resume: bool = False
    seed: int = 0


def parse(args: Sequence[str] | None = None, description: str | None = None) -> AnyRun:
    """The command line as a configuration.

    Raises:
        ValueError: in one line that names the flag, the value and what is accepted.
    """
    args = list(sys.argv[1:] if args is None else args)
    with _errors_in_one_line():
        choice, _ = tyro.cli(Choice, args=args, return_unknown_args=True, add_help=False)
    name = choice.name or default_name(choice)
    if choice.resume:
        default = load_config(choice.out / name)
    else:
        options = default_options(choice.agent, choice.env)
        run_class = RUN_CLASSES[type(options)]
        default = run_class(agent=choice.agent, options=options, **{"env": choice.env, **ENV_DEFAULTS[choice.env]})
    with _errors_in_one_line():
        given: AnyRun = tyro.cli(
            type(default), args=args, default=default, description=description, config=(tyro.conf.OmitArgPrefixes,)
        )
    method = given.options.method if isinstance(given.options, DistillConfig) else None
    if given.teacher_cache and method is not None:
        check_cacheable(method)
    for flag, plain in (("teacher_cache", ""), ("student_dtype", "float32")):
        if method is None and getattr(given, flag) != plain:
            raise ValueError(f"{flag}: {getattr(given, flag)!r} with agent {given.agent}; accepted: a method's agent")
    if given.student_dtype != "float32" and given.env == "categorical":
        raise ValueError(f"student_dtype: {given.student_dtype!r} with a student that is a table; accepted: float32")
    if given.task_reward and method is not None and method.gamma == 0:
        raise ValueError(f"task_reward: {given.task_reward} is never seen by the agent with gamma = 0; set --gamma 1")
    if choice.resume:
        changed = [
            k for k, v in to_dict(given).items() if v != to_dict(default)[k] and k not in RESUMABLE | {"name", "out"}
        ]
        if changed:
            raise ValueError(
                f"resume: {changed[0]} differs from the run that is resumed; accepted: {sorted(RESUMABLE)}"
            )
        return dataclasses.replace(given, name=name, resume=True)
    if not choice.name and (given.out / name).exists():
        taken = (f"{name}-{i}" for i in itertools.count(2))
        name = next(n for n in taken if not (given.out / n).exists())
    return dataclasses.replace(given, name=name)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """The parser draws a box around what is wrong; the sentence in it becomes the error."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            yield
        except SystemExit as stop:
            if not stop.code:
                raise
            text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]+|-{4,}", " ", said.getvalue())
            text = text.split("For full helptext")[0]
            raise ValueError(
                re.sub(
                    r"^(Value error|Parsing error|Unrecognized options(?= Unrec)) |Error parsing options[.\w]*: ",
                    "",
                    " ".join(text.split()),
                )
            ) from None


def default_name(choice: Choice) -> str:
    agent = re.sub(r"[^A-Za-z0-9_]+", "-", choice.agent)
    return f"{agent}-{choice.env}-s{choice.seed}"


def to_dict(config: AnyRun) -> dict[str, Any]:
    """As JSON takes it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def load_config(folder: Path) -> AnyRun:
    """The configuration of a run's folder.

    Raises:
        ValueError: if there is no run, or its configuration cannot be read.
    """
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text())
        options = default_options(fields["agent"], fields["env"])
        if isinstance(options, DistillConfig):
            fields["options"]["method"] = Method(**fields["options"]["method"])
        fields["options"] = type(options)(**fields["options"])
        fields["out"], fields["name"] = folder.parent, folder.name  # it may have been moved
        return RUN_CLASSES[type(options)](**fields)
    except FileNotFoundError:
        raise ValueError(f"run: {str(folder)!r} holds no run (no config.json)") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"run: {str(path)!r} is damaged: {error}") from None


def tau_of(config: AnyRun) -> float:
    """The threshold by which steps count as hard, nats."""
    options = config.options
    return options.method.tau if isinstance(options, DistillConfig) else getattr(options, "tau", Method().tau)


def make_env(config: AnyRun, split: Split, rows: int, *, purpose: Literal["train", "evaluate"]) -> DistillVectorEnv:
    """The run's environment: for training as its agent wants it, for evaluation token by token."""
    from distill_env.env import DistillVectorEnv

    kind = type(config.options) if purpose == "train" else None
    distills = isinstance(config.options, DistillConfig) and kind is DistillConfig
    cost = tau_of(config) if config.rewrite_cost is None else config.rewrite_cost
    arguments: dict[str, Any] = {
        "split": split,
        "max_new_tokens": config.max_new_tokens,
        "rewrite": config.rewrite,
        "rewrite_top_p": config.rewrite_top_p,
        "rewrite_span": config.rewrite_span,
        "rewrite_cost": min(cost, -config.log_prob_floor),
        "log_prob_floor": config.log_prob_floor,
        "task_reward": config.task_reward,
        "chunk": config.draft_limit if distills else 1,
        "reveal_teacher": not distills,
        "autoreset_mode": "SameStep" if kind is SB3Config else "NextStep" if kind is PluginConfig else "Disabled",
    }
    if config.env in SMALL_TASKS:
        arguments |= {"task": config.env, "teacher": config.env, "teacher_kwargs": {"dtype": config.dtype}}
    elif config.env == "categorical":
        arguments |= {
            "task": "categorical",
            "teacher": "markov",
            "teacher_kwargs": {"vocab_size": CATEGORICAL_VOCABULARY},
        }
    else:
        for flag in ("teacher", "student"):
            if not getattr(config, flag):
                raise ValueError(f"{flag}: --env lm needs --{flag}")
        arguments |= {
            "task": config.task,
            "teacher": config.teacher,
            "task_kwargs": task_arguments(config),
            "teacher_kwargs": {**shared_ids(config), "dtype": config.dtype},
        }
    return DistillVectorEnv(rows, **arguments)


def task_arguments(config: AnyRun) -> dict[str, Any]:
    """The arguments of the task of --env lm. Raises ValueError for a flag that the task does not know."""
    arguments: dict[str, Any] = {
        "path": config.task_path,
        "tokenizer": config.teacher,
        "max_prompt_tokens": config.max_prompt_tokens,
        "step_pattern": config.step_pattern,
    }
    if config.task != "text":
        chat = {"auto": None, "yes": True, "no": False}[config.chat]
        return arguments | {"chat": chat, "few_shot": config.few_shot}
    if config.few_shot or config.chat == "yes":
        raise ValueError("few_shot, chat: not with --task text, which has no questions; accepted: 0, auto or no")
    return arguments | ({"max_new_tokens": config.max_new_tokens} if config.max_new_tokens else {})


def shared_ids(config: AnyRun) -> dict[str, int]:
    """The ids that teacher and student share, those of their tokenizer, which has to be one; and its end token.

    Raises:
        ValueError: if the tokenizers map text to ids differently.
    """
    from distill_env.models.load import load_tokenizer

    teacher, student = load_tokenizer(config.teacher), load_tokenizer(config.student)
    if teacher.get_vocab() != student.get_vocab():
        differing = len(set(teacher.get_vocab().items()) ^ set(student.get_vocab().items()))
        raise ValueError(
            f"student: {config.student!r} and the teacher {config.teacher!r} do not share a tokenizer ({differing} "
            "entries differ); take a student of the teacher's family"
        )
    return {"vocab_size": len(teacher), "eos_token_id": int(teacher.eos_token_id)}


def make_student(config: AnyRun, env: DistillVectorEnv) -> TrainableModel:
    """The student that a run begins with, before any warm start.

    Raises:
        ValueError: if its vocabulary is not the environment's.
    """
    import torch

    from distill_env.models.load import build_model

    if config.student:
        kwargs: dict[str, Any] = shared_ids(config) if config.env == "lm" else {}
        if config.env != "categorical":
            kwargs["dtype"] = config.student_dtype
        student: TrainableModel = build_model(config.student, **kwargs)
        if student.vocab_size != env.vocab_size:
            raise ValueError(f"student: {config.student!r} has {student.vocab_size} ids, the teacher {env.vocab_size}")
        return student
    if config.env == "categorical":
        from distill_env.models.tabular import uniform

        return uniform(CATEGORICAL_VOCABULARY)
    from distill_env.models.causal_lm import CausalLM
    from distill_env.models.small import small_student

    with torch.random.fork_rng():
        torch.manual_seed(config.options.seed)
        model = small_student(config.env, config.student_width, config.student_layers, config.student_mlp)
    model.to(getattr(torch, config.student_dtype))
    return CausalLM(model, eos_token_id=env.task.eos_token_id)


def make_agent(config: AnyRun, student: TrainableModel, env: DistillVectorEnv) -> Agent:
    """The agent of a run, around that student."""
    if isinstance(config.options, DistillConfig):
        from agents.distill import DistillAgent

        return DistillAgent(student, config.options)
    if isinstance(config.options, SB3Config):
        from agents.sb3 import SB3Agent

        return SB3Agent(student, config.options)
    return plugin(config.agent)(env, seed=config.options.seed)


def agent_class(config: AnyRun) -> Any:
    """The class whose `load` reads the run's checkpoints."""
    if isinstance(config.options, DistillConfig):
        from agents.distill import DistillAgent

        return DistillAgent
    if isinstance(config.options, SB3Config):
        from agents.sb3 import SB3Agent

        return SB3Agent
    return plugin(config.agent)


def plugin(name: str) -> Any:
    """`package.module:Class` -> the class.

    Raises:
        ValueError: if it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # a user's file beside the command
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"agent: {name!r} cannot be imported ({error}); accepted: package.module:Class") from None
    finally:
        sys.path.pop(0)
