"""The configuration of a run, and what it builds: environments, students, agents. Light to import."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from agents.config import DistillConfig, PluginConfig, SB3Config
from agents.distributed import SINGLE_PROCESS, ProcessGroup
from agents.methods import METHODS, Method, check_cacheable
from distill_env.checks import check_range, check_types
from distill_env.models.load import is_served
from distill_env.tasks.base import Split
from distill_env.tasks.registry import LANGUAGE_TASKS
from experiments.running.cli import errors_in_one_line
from experiments.running.lm_arguments import (
    adapter_arguments,
    check_flags,
    shared_ids,
    student_arguments,
    teacher_arguments,
    teacher_tokenizer,
)

if TYPE_CHECKING:
    from agents.base import Agent
    from distill_env.env import DistillVectorEnv
    from distill_env.models.base import TrainableModel
    from distill_env.tasks.base import Task

LanguageTaskName = Literal[*LANGUAGE_TASKS]  # type: ignore[valid-type]
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
    """Teacher of --env lm: a folder, a hub id, or a completions server as vLLM's, http://host:port/v1."""
    teacher_model: str = ""
    """Its name on the server, if there are several. The server's key is $DISTILL_TEACHER_KEY."""
    teacher_tokenizer: str = ""
    """Tokenizer of a served teacher: a folder or hub id; the student's if not given."""
    teacher_top_k: int = 20
    """Likeliest ids whose log-probabilities a served teacher tells, and so at most the method's top_k; 0 for all. The
    server's limit is vLLM's --max-logprobs."""
    teacher_timeout: float = 600.0
    """Seconds that a served teacher may be away before the run ends."""
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
    device: str = "cpu"
    """Of the models of --env lm: cpu, cuda, cuda:1, ..., or auto: cuda if there is one, else cpu. Not run on CUDA
    yet."""
    device_map: str = ""
    """Transformers' placement of a teacher over devices, for example auto; instead of --device. Needs accelerate. Not
    run on CUDA yet."""
    attn_implementation: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention of teacher and student; auto leaves it to Transformers. Others (flash attention) cannot serve the
    rollout's cache."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model or a tokenizer."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Weights of the teacher in so few bits, by bitsandbytes (pip install 'distill-env[quantize]'). Not run on CUDA
    yet."""
    gguf_file: str = ""
    """A GGUF file in the teacher's folder or repository, turned into --dtype (pip install 'distill-env[gguf]')."""
    lora_rank: int = 0
    """Train only a LoRA adapter of this rank on the student (pip install 'distill-env[peft]'); 0 trains all weights.
    There is no dropout: what is trained is what was rolled out. The saved student has it merged."""
    lora_alpha: float = 16.0
    """Scale of the adapter, times its rank."""
    lora_targets: str = "all-linear"
    """Modules that it is added to, for example q_proj,v_proj; all-linear is all linear ones but the head."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input of the student for the backward pass, which computes the rest again."""
    accept: tuple[Literal["special_tokens", "end_of_turn", "chat_template", "memory"], ...] = ()
    """Rows of the preflight of --env lm whose errors are accepted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "accept", tuple(self.accept))  # JSON has lists
        check_flags(self)
        check_types(self)
        check_range(self, "validate_every", "checkpoint_every", "keep_checkpoints", least=1)
        check_range(self, "iterations", "max_new_tokens", "max_prompt_tokens", "draft_limit", least=1)
        check_range(self, "eval_prompts", "eval_samples", "student_layers", "student_mlp", least=1)
        check_range(self, "few_shot", "rows", "rewrite_cost", "lora_rank", least=0)
        check_range(self, "limit", "teacher_top_k", least=0, finite=True)
        check_range(self, "task_reward", "log_prob_floor", finite=True)
        check_range(self, "warm_start", least=0, most=1)
        check_range(self, "threads", least=0, most=4096)  # above any machine's, under what overflows
        if not self.log_prob_floor < 0:
            raise ValueError(f"log_prob_floor: {self.log_prob_floor} is not below 0, as log-probabilities are")
        if not 0 < self.rewrite_top_p <= 1:
            raise ValueError(f"rewrite_top_p: {self.rewrite_top_p} is not in (0, 1]")
        if self.student_width < 4 or self.student_width % 4:
            raise ValueError(f"student_width: {self.student_width}; accepted: a multiple of 4, at least 4")
        if Path(self.name).name != self.name or self.name == ".." or len(self.name.encode()) > 200:
            raise ValueError(f"name: {self.name!r}; accepted: the name of one folder under --out, up to 200 bytes")
        if self.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise ValueError(f"push_to_hub: {self.push_to_hub!r}; accepted: user/name")


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
RESUMABLE |= {"keep_checkpoints", "track", "push_to_hub", "teacher_cache", "device", "device_map"}
RESUMABLE |= {"gradient_checkpointing", "teacher_timeout"}


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
    with errors_in_one_line():
        choice, _ = tyro.cli(Choice, args=args, return_unknown_args=True, add_help=False)
    name = choice.name or default_name(choice)
    if choice.resume:
        default = load_config(choice.out / name)
    else:
        options = default_options(choice.agent, choice.env)
        run_class = RUN_CLASSES[type(options)]
        default = run_class(agent=choice.agent, options=options, **{"env": choice.env, **ENV_DEFAULTS[choice.env]})
    with errors_in_one_line():
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
    if is_served(given.teacher):
        given = truncated(given)
    if method is not None and given.rows > given.options.batch_size:
        raise ValueError(f"rows: {given.rows}; accepted: at most the batch size, {given.options.batch_size}")
    if choice.resume:
        moved = {"teacher"} if is_served(default.teacher) and is_served(given.teacher) else set()
        may = RESUMABLE | moved | {"name", "out"}
        changed = [k for k, v in to_dict(given).items() if v != to_dict(default)[k] and k not in may]
        if changed:
            raise ValueError(
                f"resume: {changed[0]} differs from the run that is resumed; accepted: {sorted(RESUMABLE)}"
            )
        return dataclasses.replace(given, name=name, resume=True)
    if not choice.name and (given.out / name).exists():
        taken = (f"{name}-{i}" for i in itertools.count(2))
        name = next(n for n in taken if not (given.out / n).exists())
    return dataclasses.replace(given, name=name)


def truncated(config: AnyRun) -> AnyRun:
    """With a served teacher divergences are of its likeliest ids and a tail.

    Raises:
        ValueError: for a method that needs all of the teacher's distribution.
    """
    told, options = config.teacher_top_k, config.options
    if not told or not isinstance(options, DistillConfig):
        return config
    wanted = options.method.top_k or told
    if wanted > told:
        raise ValueError(f"top_k: {wanted}; accepted: at most teacher_top_k, {told}")
    try:
        method = dataclasses.replace(options.method, top_k=wanted)
    except ValueError as error:
        raise ValueError(
            f"teacher: {config.teacher!r} tells its {told} likeliest ids, and so cannot be: {error}, with "
            "--teacher-top-k 0"
        ) from None
    return dataclasses.replace(config, options=dataclasses.replace(options, method=method))  # type: ignore[arg-type]


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
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"run: {str(folder)!r} holds no run (no config.json)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"run: {str(path)!r} is damaged: {type(error).__name__}: {error}") from None


def tau_of(config: AnyRun) -> float:
    """The threshold by which steps count as hard, nats."""
    options = config.options
    return options.method.tau if isinstance(options, DistillConfig) else getattr(options, "tau", Method().tau)


def make_env(
    config: AnyRun,
    split: Split,
    rows: int,
    *,
    purpose: Literal["train", "evaluate", "decode"],
    task: Task | None = None,
) -> DistillVectorEnv:
    """The run's environment: for training as its agent wants it, for evaluation token by token, for decoding by whole
    drafts. `task` is taken instead of the run's own."""
    from distill_env.env import DistillVectorEnv

    kind = type(config.options) if purpose == "train" else None
    distills = purpose == "decode" or kind is DistillConfig
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
            "teacher_kwargs": teacher_arguments(config),
        }
    if task is not None:
        arguments |= {"task": task, "task_kwargs": None}
    return DistillVectorEnv(rows, **arguments)


def task_arguments(config: AnyRun) -> dict[str, Any]:
    """The arguments of the task of --env lm. Raises ValueError for a flag that the task does not know."""
    arguments: dict[str, Any] = {
        "path": config.task_path,
        "tokenizer": teacher_tokenizer(config),
        "max_prompt_tokens": config.max_prompt_tokens,
        "step_pattern": config.step_pattern,
    }
    if config.task != "text":
        chat = {"auto": None, "yes": True, "no": False}[config.chat]
        return arguments | {"chat": chat, "few_shot": config.few_shot}
    if config.few_shot or config.chat == "yes":
        raise ValueError("few_shot, chat: not with --task text, which has no questions; accepted: 0, auto or no")
    return arguments | ({"max_new_tokens": config.max_new_tokens} if config.max_new_tokens else {})


def make_student(config: AnyRun, env: DistillVectorEnv) -> TrainableModel:
    """The student that a run begins with, before any warm start.

    Raises:
        ValueError: if its vocabulary is not the environment's.
    """
    import torch

    from distill_env.models.load import build_model

    if config.student:
        kwargs: dict[str, Any] = {} if config.env == "categorical" else {"dtype": config.student_dtype}
        if config.env == "lm":
            kwargs |= {**shared_ids(config), **student_arguments(config), **adapter_arguments(config)}
        student: TrainableModel = build_model(config.student, **kwargs)
        if student.vocab_size != env.vocab_size:
            raise ValueError(f"student: {config.student!r} has {student.vocab_size} ids, the teacher {env.vocab_size}")
        return student
    if config.env == "categorical":
        from distill_env.models.tabular import uniform

        return uniform(CATEGORICAL_VOCABULARY)
    from distill_env.models.causal_lm import CausalLM
    from distill_env.models.toy import toy_student

    with torch.random.fork_rng():
        torch.manual_seed(config.options.seed)
        model = toy_student(config.env, config.student_width, config.student_layers, config.student_mlp)
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


def agent_loader(config: AnyRun, processes: ProcessGroup = SINGLE_PROCESS) -> Callable[[Path], Any]:
    """Reads an agent of the run from a checkpoint, its student as the flags say."""
    load = agent_class(config).load
    if isinstance(config.options, DistillConfig):
        load = partial(load, processes=processes)
    return load if isinstance(config.options, PluginConfig) else partial(load, **student_arguments(config))


def plugin(name: str) -> Any:
    """`package.module:Class` -> the class.

    Raises:
        ValueError: if it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # a user's file beside the command
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"agent: {name!r} cannot be imported ({reason}); accepted: package.module:Class") from None
    finally:
        sys.path.pop(0)
    missing = [verb for verb in ("learn", "act", "save", "load") if not callable(getattr(found, verb, None))]
    if missing or not isinstance(found, type):
        lacks = f"has no {', '.join(missing)}" if missing else "is no class"
        raise ValueError(f"agent: {name!r} {lacks}; accepted: a class as agents.base.Agent describes it")
    return found
