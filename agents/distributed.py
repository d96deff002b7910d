"""One student trained by several processes: each takes a part of every batch, and the gradients are summed.

`accelerate launch` starts the processes. Each holds the whole student and optimiser (data parallel), or, with
`--use_fsdp`, a shard of every tensor of both (Zhao et al. 2023, "PyTorch FSDP", 2304.11277). The weights after training
do not depend on the number of processes, up to rounding. In a single process every method here is the identity.

A sharded student is sharded during updates only. Rollouts need every weight for every token, and the processes do not
decode in step, so that all weights are gathered before a rollout. During an update each layer is gathered while it
computes.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
TIMEOUT = timedelta(days=1)  # the other processes wait while the main process evaluates
# settings of accelerate that have no effect here: (name, environment variable, accepted values, what to use instead)
FIXED_SETTINGS = (
    ("mixed_precision", "ACCELERATE_MIXED_PRECISION", ("no",), "; the student's dtype is student_dtype"),
    ("fsdp_sharding_strategy", "FSDP_SHARDING_STRATEGY", ("FULL_SHARD", "1"), ", or no use_fsdp"),
    ("fsdp_reshard_after_forward", "FSDP_RESHARD_AFTER_FORWARD", ("true", "full_shard"), ""),
    ("fsdp_offload_params", "FSDP_OFFLOAD_PARAMS", ("false",), ""),
    ("fsdp_auto_wrap_policy", "FSDP_AUTO_WRAP_POLICY", ("TRANSFORMER_BASED_WRAP",), ""),
    ("fsdp_activation_checkpointing", "FSDP_ACTIVATION_CHECKPOINTING", ("false",), "; use gradient_checkpointing"),
)


class Command(IntEnum):
    """What the main process tells the others to do next."""

    STOP = 0
    CONTINUE = 1
    GATHER = 2


class TrainingEnded(Exception):
    """The main process has ended the training."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process and those it trains with. The main process, of rank 0, decides and writes to disk."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"  # of tensors that are summed
    mesh: Any = None  # the device mesh of a sharded student

    @property
    def shards(self) -> int:
        """The number of processes that the student is sharded over."""
        return 1 if self.mesh is None else self.world_size

    def local_slice(self, size: int) -> slice:
        """This process's part of a batch of `size` completions. Parts differ by at most one completion."""
        return slice(size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size)

    def continue_or_stop(self, more: bool = True, gather: Callable[[], object] = dict) -> None:
        """The main process tells the others whether there is another iteration.

        Args:
            more: whether there is; of the main process.
            gather: called in the other processes each time the main process saves a checkpoint meanwhile.

        Raises:
            TrainingEnded: in the other processes, if there is none.
        """
        try:
            command = self.broadcast(Command.CONTINUE if more else Command.STOP)
        except RuntimeError:
            if more:
                raise
            return  # the others have ended already, by the same error
        while self.rank and command == Command.GATHER:
            gather()
            command = self.broadcast(command)
        if self.rank and command == Command.STOP:
            raise TrainingEnded

    def close(self) -> None:
        """Leave the group, whose threads would otherwise be alive when the process exits, which aborts it at times."""
        if self.world_size > 1:
            distributed.destroy_process_group()

    def broadcast(self, value: T) -> T:
        """The value of the main process."""
        if self.world_size == 1:
            return value
        message = [value]
        distributed.broadcast_object_list(message, 0)
        return message[0]

    def all_reduce_sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over all processes, which pass the same keys."""
        if self.world_size == 1:
            return values
        keys = sorted(values)
        sums = torch.tensor([values[key] for key in keys], dtype=torch.float64, device=self.device)
        distributed.all_reduce(sums)
        return dict(zip(keys, sums.tolist(), strict=True))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over the processes. FSDP has summed those of a sharded student already."""
        if self.world_size == 1 or self.mesh is not None:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)

    def shard(self, student: Any) -> bool:
        """Shard the student's weights, which replaces its parameters. No process waits for another here.

        Returns:
            Whether the student was sharded by this call. Its optimiser then has to be made anew.

        Raises:
            ValueError: for a student whose layers are unknown, or that is only partly trained.
        """
        if self.mesh is None or _fsdp_modules(student):
            return False
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import DTensor

        from distill_env.models.pretrained import decoder_layers

        # GPT-2's decoder returns a view, which no code here changes in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        model: Any = getattr(student, "model", None)
        layers = decoder_layers(model) if model is not None else []
        if not layers or not all(p.requires_grad for p in model.parameters()):
            expected = "expected a language model with known layers, all of it trained"
            raise ValueError(f"use_fsdp: cannot shard {type(model or student).__name__}; {expected}")
        decoder, head = model.base_model, model.get_output_embeddings()
        policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(model.dtype, torch.float32))
        for layer in reversed(layers):  # inner layers first
            fully_shard(layer, mesh=self.mesh, mp_policy=policy)
        # the head runs apart from the decoder, chunk by chunk, but is gathered and sharded together with it
        decoder.add_module("head_of_student", head)
        fully_shard(decoder, mesh=self.mesh, mp_policy=policy, reshard_after_forward=False)
        del decoder.head_of_student
        for module in _fsdp_modules(student):
            module.set_gradient_divide_factor(1.0)  # sums, not means
            module.set_force_sum_reduction_for_comms(True)  # the only reduction that gloo has
        student.pass_overhead = 2**62  # every process makes one pass, whatever the lengths of its completions
        outside = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if outside:
            raise ValueError(f"use_fsdp: {outside[0]} of {type(model).__name__} is in neither its decoder nor its head")
        return True

    def unshard(self, student: Any) -> None:
        """Gather all weights of a sharded student in every process, until the next `sharded`."""
        if self.mesh is None:
            return
        from torch.autograd.graph import increment_version

        for module in _fsdp_modules(student):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        increment_version(student.parameters())

    @contextmanager
    def sharded(self, student: Any) -> Iterator[None]:
        """Shard the weights inside the block, where the optimiser may change them; gather them at its end."""
        if self.mesh is not None:
            root, *layers = _fsdp_modules(student)
            root.reshard()
            for module in layers:
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()
        yield
        self.unshard(student)

    def extra_passes(self, batch_size: int, passes: int, micro_batch: int) -> int:
        """How many more forward and backward passes another process makes. Sharded, all make equally many.

        Args:
            batch_size: completions of the whole batch.
            passes: passes of this process.
            micro_batch: completions in a pass; 0 for all.
        """
        if self.mesh is None:
            return 0
        most = math.ceil(batch_size / self.world_size)
        return (math.ceil(most / micro_batch) if micro_batch else 1) - passes

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float) -> float:
        """Scale the gradients down to a norm of at most `max_norm`. Returns their norm before, over all processes."""

        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return float(getattr(norm, "full_tensor", lambda: norm)())

    def gather_full(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors, on the CPU if the student is sharded. Other processes than the main process get none then."""
        if self.mesh is None:
            return tensors
        if self.rank == 0:
            self.broadcast(Command.GATHER)
        gathered = {}
        for name, tensor in tensors.items():  # one at a time, since every process holds the full tensor for a moment
            full = getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)()
            if self.rank == 0:
                gathered[name] = full.cpu()
        return gathered


SINGLE_PROCESS = ProcessGroup()


def _fsdp_modules(student: Any) -> list[Any]:
    """The modules of a sharded student that are gathered as one, the decoder first."""
    from torch.distributed.fsdp import FSDPModule

    model = getattr(student, "model", None)
    return [] if model is None else [m for m in model.modules() if isinstance(m, FSDPModule)]


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a full tensor, placed as the parameter is; the tensor itself if that is not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return tensor
    local = tensor.to(parameter.device)
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)


def init_distributed() -> ProcessGroup:
    """The processes that `accelerate launch` (or torchrun) started together with this one.

    Raises:
        ValueError: if accelerate is not installed, or one of its settings would have no effect.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SINGLE_PROCESS
    try:
        from accelerate import PartialState
    except ImportError:
        raise ValueError('accelerate: not installed; several processes need pip install -e ".[distributed]"') from None
    use_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    for name, variable, accepted, instead in FIXED_SETTINGS:
        value = os.environ.get(variable, accepted[0])
        if (use_fsdp or "FSDP" not in variable) and value not in accepted:
            raise ValueError(f"{name}: {value!r} is not supported; expected {accepted[0]}{instead}")
    # with "true" some releases of Transformers 5 leave models empty in all but the main process, teachers included
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    processes = ProcessGroup(state.process_index, state.num_processes, str(state.device))
    if not use_fsdp:
        return processes
    from torch.distributed.device_mesh import init_device_mesh

    return replace(processes, mesh=init_device_mesh(state.device.type, (processes.world_size,)))
