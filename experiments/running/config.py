"""The configuration of a run: nested frozen dataclasses, whose fields are the flags of run.py. Light to import."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from agents import pair
from agents.config import (
    LARGEST_RUN_SEED,
    DistillConfig,
    OptimizerConfig,
    PluginConfig,
    PositiveFinite,
    SB3Config,
)
from agents.methods import METHODS, Method, check_cacheable, for_new_pair
from distill_env.checks import Count, Finite, Natural, Range, check_range
from distill_env.models.load import is_served
from distill_env.tasks.registry import LANGUAGE_TASKS
from experiments.running.plugins import config_class, is_name
from experiments.running.section import Section, flag

EnvName = Literal["sums", "coins", "categorical", "lm"]
Acceptable = Literal["special_tokens", "end_of_turn", "chat_template", "memory"]  # rows of the preflight
Track = Literal["tensorboard", "wandb", "trackio", "none"]
TrainOn = Literal["last", "all"]
Dtype = Literal["auto", "float32", "bfloat16"]
AgentOptions = DistillConfig | SB3Config | PluginConfig
SMALL_TASKS = ("sums", "coins")  # with a trained teacher that ships with the project
SB3_AGENTS: dict[str, Literal["ppo", "a2c"]] = {"ppo": "ppo", "a2c": "a2c"}
AGENT_HELP = f"A method ({', '.join(METHODS)}), ppo or a2c from Stable-Baselines3, or package.module:Class."


@dataclass(frozen=True)
class TrainingConfig(Section):
    """Length of the training, validations and checkpoints."""

    iterations: Count = 400
    """Number of iterations, each with one batch and one update."""
    limit: Annotated[float, Range(least=0, finite=True)] = 0.0
    """End the training after this amount of --limit-of; 0 sets no limit."""
    limit_of: Literal["tokens", "student_tokens", "teacher_positions", "teacher_tokens"] = "student_tokens"
    """What --limit counts: all tokens written, tokens that the student writes, positions that the teacher scores, or
    tokens that the teacher writes."""
    warm_start: float | str = 1 / 3
    """Supervised fine-tuning before the training: a share of the teacher's accuracy to reach, or sft:N for N updates,
    which with --env lm are on the references of the data if it has them, else on the teacher's text. 0 skips it."""
    validate_every: Count = 10
    """Iterations between validations."""
    checkpoint_every: Count = 50
    """Iterations between checkpoints."""
    keep_checkpoints: Count = 2
    """Number of recent checkpoints to keep."""
    threads: Annotated[int, Range(least=0, most=4096)] = 0  # most: above any machine, below what overflows
    """Number of torch threads; 0 keeps torch's default."""

    def check(self) -> None:
        how = self.warm_start
        if not (re.fullmatch(r"sft:[1-9]\d*", how) if isinstance(how, str) else 0 <= how <= 1):
            raise ValueError(f"warm_start: {how}; expected a share in [0, 1], or sft:N")

    @property
    def warm_updates(self) -> int:
        """The number of updates of a warm start that has a fixed number, else 0."""
        return int(self.warm_start.removeprefix("sft:")) if isinstance(self.warm_start, str) else 0


@dataclass(frozen=True)
class TeacherConfig(Section):
    """The teacher."""

    models: Annotated[tuple[str, ...], flag("teacher")] = ()
    """Folder or hub id of the teacher; BASE+ADAPTER, with a LoRA adapter to merge; the URL of a completions server such
    as vLLM's, http://host:port/v1; or self for the initial student. Several teachers are NAME=MODEL each; the column
    teacher of the data names them."""
    served_model: Annotated[str, flag("teacher-model")] = ""
    """Name of the teacher on its server, if the server has several models. The server's key is read from
    $DISTILL_TEACHER_KEY."""
    tokenizer: Annotated[str, flag("teacher-tokenizer")] = ""
    """Folder or hub id of the tokenizer of a served teacher; by default the student's tokenizer."""
    top_k: Annotated[Natural, flag("teacher-top-k")] = 20
    """Number of log-probabilities per position that a served teacher returns; 0 for all. At most vLLM's --max-logprobs,
    and at least the method's --top-k."""
    timeout: Annotated[PositiveFinite, flag("teacher-timeout")] = 600.0
    """Seconds to wait for an unreachable server before the run ends."""
    cache: Annotated[str, flag("teacher-cache")] = ""
    """Folder in which the teacher's completions are cached for later runs. Only for methods whose completions do not
    depend on the student. The files hold the teacher's distributions, and are large without --top-k."""
    dtype: Dtype = "float32"
    """Data type of the teacher's weights: auto is bfloat16 on a GPU, else float32."""
    device_map: str = ""
    """Transformers' device map for the teacher, such as auto, instead of --device. Needs accelerate. Untested."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Quantise the teacher's weights with bitsandbytes (pip install 'distill-env[quantize]'). Untested."""
    gguf_file: str = ""
    """GGUF file in the teacher's folder or repository, converted to --dtype (pip install 'distill-env[gguf]')."""

    @property
    def by_name(self) -> dict[str, str]:
        """The model of each teacher; a single one may have the name ""."""
        return dict(_named(model) for model in self.models)

    @property
    def model(self) -> str:
        """The only teacher, or the first of several."""
        return next(iter(self.by_name.values()), "")

    @property
    def local(self) -> dict[str, str]:
        """The teachers that are loaded here, by name."""
        return {name: model for name, model in self.by_name.items() if not is_served(model)}

    @property
    def is_served(self) -> bool:
        """Whether one of them is behind a server."""
        return len(self.local) < len(self.by_name)

    def check(self) -> None:
        if len(self.by_name) < len(self.models) or (len(self.models) > 1 and "" in self.by_name):
            given = " ".join(self.models)
            raise ValueError(f"models: {given!r}; expected one teacher, or NAME=MODEL for each with different names")
        if self.gguf_file and self.quantize != "none":
            raise ValueError(f"gguf_file: {self.gguf_file!r} with quantize {self.quantize}; expected one of the two")


def _named(model: str) -> tuple[str, str]:
    """NAME=MODEL as a pair; the name of any other model is empty."""
    match = re.fullmatch(r"([A-Za-z_][\w-]*)=(.+)", model)
    return (match[1], match[2]) if match else ("", model)


@dataclass(frozen=True)
class StudentConfig(Section):
    """The student."""

    model: Annotated[str, flag("student")] = ""
    """Folder or hub id of the initial student. By default, sums, coins and categorical start from a new one."""
    width: Annotated[int, flag("student-width")] = 16
    """Hidden width of a new student, a multiple of 4."""
    layers: Annotated[Count, flag("student-layers")] = 2
    """Number of layers of a new student."""
    mlp: Annotated[Count, flag("student-mlp")] = 32
    """Feed-forward width of a new student."""
    dtype: Annotated[Dtype, flag("student-dtype")] = "float32"
    """Data type in which the student computes and is saved: auto is bfloat16 on a GPU, else float32. With bfloat16 the
    optimiser keeps and updates float32 copies of the weights."""
    lora_rank: Natural = 0
    """Rank of a LoRA adapter (pip install 'distill-env[peft]'); 0 trains all weights. Only the adapter is trained. It
    has no dropout, so the student that writes is the one that is trained. It is merged into the saved student."""
    lora_alpha: PositiveFinite = 16.0
    """Scale of the adapter, multiplied by its rank."""
    lora_targets: str = "all-linear"
    """Modules that get an adapter, such as q_proj,v_proj; all-linear is every linear layer except the head."""
    gradient_checkpointing: bool = False
    """Save memory: keep only the input of each layer, and recompute the rest in the backward pass."""

    def check(self) -> None:
        if self.width < 4 or self.width % 4:
            raise ValueError(f"width: {self.width}; expected a multiple of 4, at least 4")


@dataclass(frozen=True)
class LoadingConfig(Section):
    """How the models of --env lm are loaded."""

    device: str = "cpu"
    """Device of both models: cpu, cuda, cuda:1, ..., or auto (cuda if available, else cpu)."""
    attn_implementation: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation of both models; auto lets Transformers choose. Others, such as flash attention, do not
    work with the rollout's cache."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model or a tokenizer."""
    accept: tuple[Acceptable, ...] = ()
    """Preflight checks whose errors are accepted; see preflight.py."""


@dataclass(frozen=True)
class DataConfig(Section):
    """The task of --env lm."""

    task: str = "instruct"
    """Task, or package.module:Class; docs/your_data.md lists the formats of its data."""
    path: Annotated[str, flag("task-path")] = ""
    """Data of the task: a file (.jsonl, .json, .csv, .parquet, .txt), a folder of files with train, validation or test
    in their names, or a hub id. By default the data set of that name on the hub; instruct has no default."""
    train_on: TrainOn = "last"
    """Which messages of the assistant are reference completions: the last of a conversation, or all, each with the
    messages before it as the prompt."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, instead of ending with an error that names them."""
    few_shot: Natural = 0
    """Number of solved examples from the train split before each question."""
    chat: Literal["auto", "yes", "no"] = "auto"
    """Whether to apply the tokenizer's chat template to prompts; auto applies it if there is one."""
    chat_template: str = ""
    """File with a Jinja chat template for both models, instead of the tokenizer's."""
    chat_template_kwargs: str = ""
    """Variables of the chat template as a JSON object, such as {"enable_thinking":false}."""
    eos_token: str = ""
    """Token that ends a completion, instead of the tokenizer's end-of-sequence token."""
    step_pattern: str = ""
    """Regular expression for tokens that end a reasoning step; the default is a newline."""
    max_prompt_tokens: Annotated[int | None, Range(least=1)] = None
    """Maximum prompt length in tokens; longer prompts are skipped. By default 512 on an accelerator, 128 on a CPU."""
    teacher_prompt: str = ""
    """What the teacher reads in place of each prompt: a text with {prompt}, and perhaps {solution} and {answer} for the
    reference completion and the final answer. A column teacher_prompt of the data comes first."""
    teacher_few_shot: Natural = 0
    """Number of solved examples before each question for the teacher, if more than --few-shot."""
    max_teacher_prompt_tokens: Count = 1024
    """Maximum length of what the teacher reads, where it is another prompt."""

    def check(self) -> None:
        if self.task not in LANGUAGE_TASKS and not is_name(self.task):
            known = ", ".join(LANGUAGE_TASKS)
            raise ValueError(f"task: {self.task!r}; expected {known} or package.module:Class")
        if self.chat == "no" and (self.chat_template or self.chat_template_kwargs):
            name = "chat_template" if self.chat_template else "chat_template_kwargs"
            raise ValueError(f"{name}: {getattr(self, name)!r} has no effect with --chat no; expected auto or yes")


@dataclass(frozen=True)
class EnvironmentConfig(Section):
    """The environment: horizon, rewrites and rewards."""

    max_new_tokens: Annotated[int | None, Range(least=1)] = None
    """Maximum number of tokens per completion (the horizon). By default the task's; for data of your own 256 on an
    accelerator, 64 on a CPU."""
    rewrite: Literal["sample", "nucleus", "argmax"] = "sample"
    """How the teacher chooses a token."""
    rewrite_top_p: Annotated[float, Range(above=0, most=1)] = 0.9
    """Probability mass of the nucleus."""
    rewrite_temperature: PositiveFinite = 1.0
    """Temperature at which the teacher draws a token; rewards and gates read its distribution at 1."""
    rewrite_span: Literal["token", "step"] = "token"
    """What one rewrite covers: a single token, or the rest of the reasoning step."""
    rewrite_cost: Annotated[float, Range(least=0)] = 0.5
    """Cost of a rewrite, in nats."""
    log_prob_floor: Annotated[float, Range(below=0, finite=True)] = -100.0
    """Lower bound of the reward of a student token, in nats."""
    task_reward: Finite = 0.0
    """Weight of the task's grade in the last reward; needs gamma > 0."""


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How a batch is generated."""

    rows: Natural = 0
    """Number of completions generated at a time. A row whose completion ends takes the next prompt of the batch; the
    batch stays the same. With --micro-batch this is gradient accumulation. 0 uses the batch size."""
    draft_limit: Count = 16
    """Maximum draft length in tokens."""


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """The evaluations before and after training."""

    prompts: Annotated[Count, flag("eval-prompts")] = 200
    """Number of prompts per split."""
    samples: Annotated[Count, flag("eval-samples")] = 8
    """Number of completions per prompt."""
    temperature: Annotated[PositiveFinite, flag("eval-temperature")] = 1.0
    """Sampling temperature of the student's completions."""
    top_p: Annotated[float, Range(above=0, most=1), flag("eval-top-p")] = 1.0
    """Probability mass of the nucleus that the student samples from."""


@dataclass(frozen=True)
class LoggingConfig(Section):
    """Where metrics and the student are sent, in addition to the run's folder."""

    track: Track = "tensorboard"
    """Tracker that also receives the metrics; wandb and trackio are optional extras."""
    push_to_hub: str = ""
    """Hub repository to upload the student to, user/name. The token is $HF_TOKEN or the stored one."""

    def check(self) -> None:
        if self.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise ValueError(f"push_to_hub: {self.push_to_hub!r}; expected user/name")


@dataclass(frozen=True)
class RunConfig(Section):
    """Train a student with its teacher in the environment."""

    agent: Annotated[str, tyro.conf.arg(help=AGENT_HELP)] = "gated"
    """Algorithm."""
    env: str = "sums"
    """Environment: sums or coins, which come with a trained teacher; categorical, a table; lm, any pair of causal
    language models; or package.module:id, registered with Gymnasium."""
    name: str = ""
    """Name of the run's folder under --out; by default it consists of the agent, the environment and the seed."""
    out: Path = Path("runs")
    """Folder that contains all runs."""
    resume: bool = False
    """Continue the run with this name from its last checkpoint."""
    dry_run: bool = False
    """Check everything, load models and data, and stop before the first token; nothing is written."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    agent_options: tyro.conf.AvoidSubcommands[AgentOptions] = field(default_factory=DistillConfig)

    def check(self) -> None:
        """The name, and what sections require of one another."""
        if Path(self.name).name != self.name or self.name == ".." or len(self.name.encode()) > 200:
            raise ValueError(f"name: {self.name!r}; expected the name of one folder under --out, up to 200 bytes")
        check_range(self.agent_options, "seed", most=LARGEST_RUN_SEED)
        method = self.method
        if method is None:
            return
        if self.teacher.cache:
            check_cacheable(method)
        refreshed = getattr(self.agent_options, "refresh_teacher", 0)
        own = self.env == "lm" and self.teacher.models in (("self",), (self.student.model,))
        if refreshed and (not own or self.teacher.cache):
            raise ValueError(
                f"refresh_teacher: {refreshed}; expected 0, or the student as its own teacher (--teacher self) and no "
                "--teacher-cache"
            )
        if self.environment.task_reward and method.gamma == 0:
            raise ValueError(f"task_reward: {self.environment.task_reward} has no effect with gamma = 0; set --gamma 1")
        rows, size = self.rollout.rows, self.agent_options.batch_size
        if rows > size:
            raise ValueError(f"rows: {rows}; expected at most the batch size, {size}")

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.out / self.name

    @property
    def method(self) -> Method | None:
        """The method of an agent that is one."""
        return self.agent_options.method if isinstance(self.agent_options, DistillConfig) else None


# what differs from the fields above, by environment
ENV_DEFAULTS: dict[str, dict[str, Any]] = {
    "sums": {},
    "coins": {"student": {"width": 24, "mlp": 48}},
    "categorical": {"training": {"iterations": 150, "warm_start": 0.0}, "evaluation": {"samples": 32}},
    "own": {"training": {"iterations": 150, "warm_start": 0.0}},
    "lm": {
        "training": {"iterations": 20, "warm_start": 0.0, "checkpoint_every": 5},
        "teacher": {"dtype": "auto"},
        "student": {"dtype": "auto"},
        "loading": {"device": "auto"},
        "evaluation": {"prompts": 32, "samples": 2},
    },
}
BATCH_SIZE = {"sums": 64, "coins": 64, "categorical": 32, "own": 32, "lm": pair.BATCH_SIZE}
LEARNING_RATE = {"sums": 2e-3, "coins": 2e-3, "categorical": 0.05, "own": 0.05, "lm": pair.LEARNING_RATE}
# PPO and A2C make many steps per iteration; the rates above ruin a warm student in the first one
SB3_LEARNING_RATE = {"sums": 1e-4, "coins": 1e-4, "categorical": 0.05, "own": 0.05, "lm": 1e-5}
# 0 adapts it. Fixed on the small tasks, so that a run repeats itself: an adapted length follows a clock, and blocks of
# another length round otherwise.
DRAFT_LENGTH = {"sums": 6, "coins": 6, "categorical": 6, "own": 6, "lm": 0}


def kind_of(env: str) -> str:
    """The key of an environment in the tables above; `own` for one of the user's.

    Raises:
        ValueError: if it is unknown.
    """
    if env in get_args(EnvName):
        return env
    if ":" not in env:
        known = ", ".join(get_args(EnvName))
        raise ValueError(f"env: {env!r} is unknown; expected {known}, or package.module:id")
    return "own"


def default_options(agent: str, env: str) -> AgentOptions:
    """The options of an agent in an environment.

    Raises:
        ValueError: for an unknown agent or environment.
    """
    kind = kind_of(env)
    size, rate = BATCH_SIZE[kind], LEARNING_RATE[kind]
    if agent in METHODS:
        method = for_new_pair(METHODS[agent]) if kind == "lm" else METHODS[agent]
        return DistillConfig(method, OptimizerConfig(rate), size, draft_length=DRAFT_LENGTH[kind])
    if agent in SB3_AGENTS:
        return SB3Config(SB3_AGENTS[agent], size, SB3_LEARNING_RATE[kind])
    if ":" in agent:
        return config_class(agent)(size)
    expected = ", ".join([*METHODS, *SB3_AGENTS])
    raise ValueError(f"agent: {agent!r} is unknown; expected one of {expected}, or package.module:Class")
