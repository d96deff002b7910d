"""Configurations of the agents. Light to import. The sentence under a field is the help text of its flag."""

from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from agents.methods import Method
from distill_env.checks import Count, Natural, Positive, Range, Seed, Share, check_fields

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
    """Step size."""
    warmup_iterations: Natural = 10
    """Iterations over which the step size rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the step size falls over decay_iterations."""
    decay_iterations: Natural = 0
    """Iterations over which the step size falls to a hundredth; 0 keeps it constant."""
    weight_decay: NotNegative = 0.0
    """Weight decay of matrices, embeddings included, not of biases and norms."""
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
        if self.schedule == "cosine" and not self.decay_iterations:
            raise ValueError("decay_iterations: 0 with schedule cosine; expected at least 1, usually all iterations")


@dataclass(frozen=True)
class DistillConfig:
    """The agent: a method, and how the student is updated."""

    method: Method = field(default_factory=Method)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: Count = 64
    """Completions per iteration."""
    micro_batch: Natural = 0
    """Completions per forward and backward pass; gradients are accumulated over the batch. 0 takes the whole batch."""
    chunk_positions: Natural = 0
    """Positions per chunk of the loss, whose distributions are in memory at a time; 0 chooses by vocabulary size."""
    draft_length: Natural = 0
    """Tokens that the student drafts before the teacher scores them; 0 adapts, 1 is token by token. It changes no
    result."""
    seed: Seed = 0
    """Seed of prompts and of all draws."""

    def __post_init__(self) -> None:
        check_fields(self)

    def positions_at_a_time(self, vocab_size: int, on_gpu: bool) -> int:
        """`chunk_positions`; if 0, a multiple of 64 from 64 to 1,024: 4 million numbers, on a GPU 64 million."""
        numbers = 2**26 if on_gpu else 2**22
        return self.chunk_positions or min(max(numbers // vocab_size // 64 * 64, 64), 1024)


@dataclass(frozen=True)
class PluginConfig:
    """Options of somebody else's agent: it is made as `Class(env, seed=seed)`."""

    batch_size: Count = 64
    """Rows of its vector environment."""
    seed: Seed = 0
    """Seed that it is given."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class SB3Config:
    """PPO or A2C of Stable-Baselines3 on the student, with REWRITE as an action that it may learn to use."""

    algorithm: Literal["ppo", "a2c"] = "ppo"
    """Whose update it is."""
    batch_size: Count = 64
    """Answers an iteration, were all as long as the horizon; shorter ones make room for more."""
    learning_rate: PositiveFinite = 1e-3
    """Step size of Adam (ppo) or RMSprop (a2c)."""
    gamma: Share = 0.0
    """Discount of what follows, in [0, 1]; only 0 makes the entropy bonus a reverse KL."""
    ent_coef: NotNegative = 1.0
    """Weight of the entropy bonus; 1 makes the per-step objective a reverse KL, 0 learns to end at once."""
    normalize_advantage: bool = False
    """Normalise advantages in a minibatch, which moves the optimum."""
    n_epochs: Count = 4
    """Passes over a batch (ppo)."""
    minibatches: Count = 4
    """Parts of a batch, one step of the optimiser each (ppo); fewer if the batch does not divide so."""
    max_grad_norm: Positive = 0.5
    """Gradients are scaled down to this norm."""
    seed: Seed = 0
    """Seed of prompts and of all draws."""

    def __post_init__(self) -> None:
        check_fields(self)
