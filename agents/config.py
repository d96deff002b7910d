"""Configurations of the agents. Light to import. The sentence under a field is the help text of its flag."""

from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from agents.methods import Method
from distill_env.checks import Count, Natural, Positive, Range, Seed, Share, check_fields

LARGEST_RUN_SEED = 2**32 - 1  # evaluations and the data of warm starts have larger ones, so streams of their own
EVALUATION_SEED = LARGEST_RUN_SEED + 1
PositiveFinite = Annotated[float, Range(above=0, finite=True)]
NotNegative = Annotated[float, Range(least=0, finite=True)]
Decay = Annotated[float, Range(least=0, below=1)]
T = TypeVar("T")


def from_dict(kind: type[T], fields: dict[str, Any]) -> T:
    """A dataclass, and the dataclasses in it, from the dictionary that `dataclasses.asdict` makes of it."""
    hints = get_type_hints(kind)
    nested = {name for name in fields if is_dataclass(hints.get(name))}
    return kind(**{k: from_dict(hints[k], v) if k in nested else v for k, v in fields.items()})


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser, AdamW."""

    learning_rate: PositiveFinite = 1e-3
    """Learning rate after the warm-up."""
    warmup_iterations: Natural = 10
    """Iterations over which the learning rate rises linearly from 0."""
    schedule: Literal["auto", "constant", "linear", "cosine"] = "auto"
    """How the learning rate falls to a hundredth; auto is linear if decay_iterations is given, else constant."""
    decay_iterations: Natural = 0
    """Iterations over which the learning rate falls; with linear or cosine 0 stands for all iterations of a run."""
    weight_decay: NotNegative = 0.0
    """Weight decay of matrices, including embeddings, but not of biases and norms."""
    adam_beta1: Decay = 0.9
    """Decay rate of the gradient's moving average, in [0, 1)."""
    adam_beta2: Decay = 0.999
    """Decay rate of the squared gradient's moving average, in [0, 1)."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.schedule == "constant" and self.decay_iterations:
            raise ValueError(f"decay_iterations: {self.decay_iterations} with schedule constant; expected 0")


@dataclass(frozen=True)
class DistillConfig:
    """The agent: a method, and how the student is updated."""

    method: Method = field(default_factory=Method)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: Count = 64
    """Completions per iteration."""
    samples_per_prompt: Count = 1
    """Completions of each prompt in a batch. Both models read its prompt once."""
    micro_batch: Natural = 0
    """Completions per forward and backward pass; gradients are accumulated over the batch. 0 takes the whole batch."""
    chunk_positions: Natural = 0
    """Positions per chunk of the loss; only one chunk's distributions are in memory at a time. 0 chooses by vocabulary
    size."""
    teacher_buffer_gib: NotNegative = 16.0
    """GiB of the teacher's distributions of a batch that may stay on a GPU until the update; more are kept in main
    memory."""
    draft_length: Natural = 0
    """Tokens that the student drafts before the teacher scores them; 0 adapts the length, 1 is token by token. The
    result does not depend on it."""
    hand_over_width: Natural = 64
    """Width of the head that learns to predict D_t beside the student. With it the student knows when to ask its
    teacher; 0 trains none."""
    hand_over_weight: NotNegative = 0.0
    """Weight of the head's loss in the student's loss; 0 keeps its gradient from the student."""
    refresh_teacher: Natural = 0
    """Iterations after which the student as it then is becomes the teacher; 0 keeps the teacher. Evaluations keep the
    teacher that the run began with."""
    seed: Seed = 0
    """Seed of the prompts and of all random draws."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hand_over_weight and not self.hand_over_width:
            raise ValueError(f"hand_over_weight: {self.hand_over_weight} with hand_over_width 0; expected a head")

    def positions_at_a_time(self, vocab_size: int, on_gpu: bool) -> int:
        """`chunk_positions`; if 0, a multiple of 64 from 64 to 1,024: 4 million numbers, on a GPU 64 million."""
        numbers = 2**26 if on_gpu else 2**22
        return self.chunk_positions or min(max(numbers // vocab_size // 64 * 64, 64), 1024)


@dataclass(frozen=True)
class PluginConfig:
    """Options of your own agent, which is constructed as `Class(env, seed=seed)`."""

    batch_size: Count = 64
    """Number of rows of the vector environment."""
    seed: Seed = 0
    """Seed that is passed to the agent."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class SB3Config:
    """PPO or A2C from Stable-Baselines3, trained on the student, with REWRITE as an action that it may learn to use."""

    algorithm: Literal["ppo", "a2c"] = "ppo"
    """Algorithm of Stable-Baselines3."""
    batch_size: Count = 64
    """Completions per iteration if all have the maximum length; if they are shorter, there are more."""
    learning_rate: PositiveFinite = 1e-3
    """Learning rate of Adam (ppo) or RMSprop (a2c)."""
    gamma: Share = 0.0
    """Discount factor, in [0, 1]; the entropy bonus gives a reverse KL only with 0."""
    ent_coef: NotNegative = 1.0
    """Weight of the entropy bonus; with 1 the per-token objective is a reverse KL, with 0 the agent learns to end at
    once."""
    normalize_advantage: bool = False
    """Normalise advantages per minibatch; this changes the optimum."""
    n_epochs: Count = 4
    """Number of passes over a batch (ppo)."""
    minibatches: Count = 4
    """Number of minibatches per batch, one optimiser step each (ppo); fewer if the batch cannot be divided evenly."""
    max_grad_norm: Positive = 0.5
    """Gradients are clipped to this norm."""
    seed: Seed = 0
    """Seed of the prompts and of all random draws."""

    def __post_init__(self) -> None:
        check_fields(self)
