"""The hand-over head: predicts, from what a student knows, how far it is from its teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_env.divergence import entropy

FILE = "hand_over.safetensors"
OFFSET = 0.01  # nats, c in log(D_t + c): differences below it hardly count
LIKELIEST = 5  # tokens whose log-probabilities are read
LEAST_LOG_PROB = -12.0


class HandOverHead(nn.Module):
    """Predicts log(D_t + c), D_t = KL(student || teacher), in two layers.

    It reads the student's last hidden state, the entropy of its distribution, and the log-probabilities of its five
    likeliest tokens. A gate that compares the prediction with a threshold calls the teacher without having asked it.

    Args:
        d: width of the hidden state.
        vocab_size: V.
        width: of the hidden layer.
        seed: of the initial weights.
    """

    def __init__(self, d: int, vocab_size: int, width: int, seed: int = 0) -> None:
        super().__init__()
        self.d, self.width = d, width
        self.n_inputs = d + 1 + min(LIKELIEST, vocab_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.LayerNorm(d)
            self.layers = nn.Sequential(nn.Linear(self.n_inputs, width), nn.GELU(), nn.Linear(width, 1))

    def inputs(self, states: Tensor, log_probs: Tensor) -> Tensor:
        """What the head reads: hidden states [..., d] and log-probabilities [..., V] -> float32 [..., n_inputs]."""
        likeliest = log_probs.topk(self.n_inputs - self.d - 1, -1).values.clamp(min=LEAST_LOG_PROB)
        parts = states, entropy(log_probs)[..., None], likeliest
        return torch.cat([x.to(states.device, torch.float32) for x in parts], -1)

    def forward(self, inputs: Tensor) -> Tensor:
        """log(D_t + c), [..., n_inputs] -> [...], float32."""
        states, confidence = inputs[..., : self.d], inputs[..., self.d :]
        prediction: Tensor = self.layers(torch.cat([self.norm(states), confidence], -1))[..., 0]
        return prediction

    @torch.no_grad()
    def divergence(self, states: Tensor, log_probs: Tensor) -> Tensor:
        """D_t as predicted, nats; arguments as for `inputs`."""
        return (self(self.inputs(states, log_probs)).exp() - OFFSET).clamp(min=0)

    def save(self, folder: str | Path) -> None:
        """Write `hand_over.safetensors` into a student's folder. Transformers does not read it."""
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self.state_dict().items()}
        save_file(tensors, Path(folder) / FILE)

    @classmethod
    def load(cls, folder: str | Path, d: int, vocab_size: int) -> HandOverHead | None:
        """The head in a student's folder; None if there is none.

        Args:
            folder: of the student.
            d, vocab_size: of the student.

        Raises:
            ValueError: if the file is damaged, or the head belongs to a student of another shape.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
            (reads,), width = tensors["norm.weight"].shape, len(tensors["layers.0.weight"])
            head = cls(reads, vocab_size, width)
            if reads == d:
                head.load_state_dict(tensors)
        except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"student: {str(path)!r} is no hand-over head ({reason}); restore it, or delete it"
            ) from None
        if reads != d:
            raise ValueError(
                f"student: the head in {str(path)!r} reads hidden states of width {reads}, this student has {d}; put "
                "back the head that was trained with it, or delete the file"
            )
        return head
