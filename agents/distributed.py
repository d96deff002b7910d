"""One student, several processes: each writes and learns from its part of every batch, and the gradients are summed.

`accelerate launch` starts the processes. All hold the whole student and the whole optimiser (data parallel), or with
`--use_fsdp` each a share of every tensor of both (fully sharded; Zhao et al. 2023, "PyTorch FSDP", 2304.11277). Any
number of processes ends at the same weights, to rounding. Alone, everything here is the identity.

A sharded student is whole except in an update: decoding needs every weight for every token, and the processes do not
decode in step. In an update a layer is whole while it computes.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=1)  # the others wait while the first validates
END, ON, GATHER = 0, 1, 2  # what the first tells the others
# accelerate's settings that would be ignored: its flag, how it tells it, what is accepted, and what to do instead
FIXED = (
    ("mixed_precision", "ACCELERATE_MIXED_PRECISION", ("no",), "run.py's --student-dtype"),
    ("fsdp_sharding_strategy", "FSDP_SHARDING_STRATEGY", ("FULL_SHARD", "1"), "no --use_fsdp to shard nothing"),
    ("fsdp_reshard_after_forward", "FSDP_RESHARD_AFTER_FORWARD", ("true", "full_shard"), ""),
    ("fsdp_offload_params", "FSDP_OFFLOAD_PARAMS", ("false",), ""),
    ("fsdp_auto_wrap_policy", "FSDP_AUTO_WRAP_POLICY", ("TRANSFORMER_BASED_WRAP",), ""),
    ("fsdp_activation_checkpointing", "FSDP_ACTIVATION_CHECKPOINTING", ("false",), "run.py's --gradient-checkpointing"),
)


class TrainingEnded(Exception):
    """The first process has ended the training."""


@dataclass(frozen=True)
class ProcessGroup:
    """Which process this is, of how many. The first decides and writes to disk."""

    number: int = 0
    count: int = 1
    device: str = "cpu"  # of what is exchanged
    mesh: Any = None  # over which a student is sharded, if it is

    @property
    def shards(self) -> int:
        """How many processes the student is split over."""
        return 1 if self.mesh is None else self.count

    def local_slice(self, size: int) -> slice:
        """This process's share of a batch of `size` answers; shares differ by one answer at most."""
        return slice(size * self.number // self.count, size * (self.number + 1) // self.count)

    def continue_or_stop(self, wanted: bool = True, gather: Callable[[], object] = dict) -> None:
        """The first says whether there is another iteration; the others hear it.

        Args:
            wanted: what the first says.
            gather: what the others do whenever the first wants to save before that.

        Raises:
            TrainingEnded: in the others, if there is none.
        """
        word = self._tell(ON if wanted else END)
        while self.number and word == GATHER:
            gather()
            word = self._tell()
        if self.number and word == END:
            raise TrainingEnded

    def _tell(self, word: int = ON) -> int:
        """The first one's word."""
        if self.count == 1:
            return word
        import torch
        from torch import distributed

        told = torch.tensor(word, device=self.device)
        distributed.broadcast(told, 0)
        return int(told)

    def broadcast_str(self, text: str) -> str:
        """The first one's text."""
        if self.count == 1:
            return text
        from torch import distributed

        told = [text]
        distributed.broadcast_object_list(told, 0)
        return told[0]

    def all_reduce_sum(self, numbers: dict[str, float]) -> dict[str, float]:
        """The sums over all processes; each gives the same keys."""
        if self.count == 1:
            return numbers
        import torch
        from torch import distributed

        values = torch.tensor([numbers[key] for key in sorted(numbers)], dtype=torch.float64, device=self.device)
        distributed.all_reduce(values)
        return dict(zip(sorted(numbers), values.tolist(), strict=True))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over the processes; those of a sharded student are sums already."""
        if self.count == 1 or self.mesh is not None:
            return
        from torch import distributed

        for parameter in parameters:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)

    # ------------------------------------------------------------------ a sharded student

    def shard(self, student: Any) -> bool:
        """Split the student's weights, from now on the parameters of an optimiser; whether there was anything to do.

        Nothing is exchanged here.

        Raises:
            ValueError: for a student that does not say what its layers are, or is not trained as a whole.
        """
        if self.mesh is None or _parts(student):
            return False
        import torch
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import DTensor

        from distill_env.models.pretrained import decoder_layers

        # GPT-2's decoder returns a view, which nobody here changes in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        model: Any = getattr(student, "model", None)
        layers = decoder_layers(model) if model is not None else []
        if not layers or not all(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"use_fsdp: cannot shard {type(model or student).__name__}; accepted: a student that is a language "
                "model with known layers, all of it trained"
            )
        decoder, head = model.base_model, model.get_output_embeddings()
        policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(model.dtype, torch.float32))
        for layer in reversed(layers):  # those in others first
            fully_shard(layer, mesh=self.mesh, mp_policy=policy)
        # the head computes by itself, chunk by chunk, on weights that come and go with the decoder's
        decoder.add_module("head_of_student", head)
        fully_shard(decoder, mesh=self.mesh, mp_policy=policy, reshard_after_forward=False)
        del decoder.head_of_student
        for part in _parts(student):
            part.set_gradient_divide_factor(1.0)  # sums, not means
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        student.pass_overhead = 2**62  # all processes make one pass, however long their answers are
        outside = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if outside:
            raise ValueError(f"use_fsdp: {outside[0]} of {type(model).__name__} is in neither its decoder nor its head")
        return True

    def unshard(self, student: Any) -> None:
        """Give every process all weights, until `split`."""
        if self.mesh is None:
            return
        from torch.autograd.graph import increment_version

        for part in _parts(student):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        increment_version(student.parameters())

    @contextmanager
    def sharded(self, student: Any) -> Iterator[None]:
        """In here a sharded student is in shards, and the optimiser may change them."""
        if self.mesh is not None:
            root, *layers = _parts(student)
            root.reshard()
            for part in layers:
                part.set_reshard_after_forward(True, recurse=False)
                part.reshard()
        yield
        self.unshard(student)

    def extra_passes(self, answers: int, passes: int, micro: int) -> int:
        """How many passes, forward and backward, this process has fewer than the one with most. All have to make as
        many if the student is sharded.

        Args:
            answers: of the whole batch.
            passes: that this process makes.
            micro: answers in one; 0 for all.
        """
        if self.mesh is None:
            return 0
        return (math.ceil(math.ceil(answers / self.count) / micro) if micro else 1) - passes

    def clip_grad_norm(self, parameters: Iterable[Tensor], largest: float) -> float:
        """Scale gradients down to that norm; what it was, over all processes."""
        import torch

        norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
        return float(getattr(norm, "full_tensor", lambda: norm)())

    def gather_full(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, of sharded ones on the CPU; in the first process."""
        if self.mesh is None:
            return tensors
        if self.number == 0:
            self._tell(GATHER)
        whole = {}
        for name, tensor in tensors.items():  # one at a time, since each is whole everywhere for a moment
            full = getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)()
            if self.number == 0:
                whole[name] = full.cpu()
        return whole


SINGLE_PROCESS = ProcessGroup()


def _parts(student: Any) -> list[Any]:
    """The modules of a sharded student whose weights come and go together, the decoder first."""
    from torch.distributed.fsdp import FSDPModule

    model = getattr(student, "model", None)
    return [] if model is None else [m for m in model.modules() if isinstance(m, FSDPModule)]


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's share of a tensor, as the parameter is sharded, if it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return tensor
    local = tensor.to(parameter.device)
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)


def init_distributed() -> ProcessGroup:
    """The processes that `accelerate launch` (or torchrun) started this one with; alone if it did not.

    Raises:
        ValueError: if accelerate is not installed, or for a setting of it that would be ignored.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessGroup()
    import torch

    try:
        from accelerate import PartialState
    except ImportError:
        raise ValueError('accelerate: several processes need it; pip install -e ".[distributed]"') from None
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    for flag, variable, accepted, instead in FIXED:
        value = os.environ.get(variable, accepted[0])
        if (sharded or "FSDP" not in variable) and value not in accepted:
            raise ValueError(f"{flag}: {value!r}; accepted: {accepted[0]}" + (f", and {instead}" if instead else ""))
    # else some releases of Transformers 5 give all but the first process empty models, even teachers
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    processes = ProcessGroup(state.process_index, state.num_processes, str(state.device))
    if not sharded:
        return processes
    from torch.distributed.device_mesh import init_device_mesh

    return replace(processes, mesh=init_device_mesh(state.device.type, (processes.count,)))


def is_first() -> bool:
    """Before `join`."""
    return os.environ.get("RANK", "0") == "0"
