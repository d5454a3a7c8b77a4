"""One process, or several that torchrun started: rank and device, the few collectives that training needs, DDP and FSDP2.

Losses are divided by counts over all processes before they are differentiated, so gradients of processes are summed, never averaged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from teacher_cache.errors import CompatibilityError
from teacher_cache.families import family_of
from teacher_cache.models.kind import decoder_of
from teacher_cache.parent import end_with_parent

T = TypeVar("T")
GRACE = 300.0
"""Seconds for the checkpoint that a run writes whose torchrun was killed."""


@dataclass(frozen=True)
class Processes:
    """Where this process stands.

    Attributes:
        device: its own GPU, or the CPU.
        files: the group in which checkpoints are written: a thread writes them while the others' collectives go on.
    """

    rank: int
    world: int
    device: torch.device
    files: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all processes."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device="cpu" if dist.get_backend() == "gloo" else self.device)
        dist.all_reduce(total)
        return total.tolist()

    def told(self, body: Any) -> list[Any]:
        """What every process says (anything that JSON can say), in their order. All call it."""
        if self.world == 1:
            return [body]
        mine = torch.frombuffer(bytearray(json.dumps(body).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(mine)]), group=self.files)
        padded = [torch.zeros(int(max(lengths)), dtype=torch.uint8) for _ in lengths]
        dist.all_gather(padded, torch.nn.functional.pad(mine, (0, len(padded[0]) - len(mine))), group=self.files)
        return [json.loads(bytes(one[: int(n)].tolist())) for one, n in zip(padded, lengths)]

    def main_alone(self, call: Callable[[], T]) -> T | None:
        """``call()`` on the main process while the others wait, which get None. Where it fails all end, the others without a word."""
        failed, result = None, None
        if self.is_main:
            try:
                result = call()
            except Exception as error:
                failed = error
        ended = any(self.told(failed is not None))
        if failed:
            raise failed
        if ended:
            raise SystemExit(1)
        return result

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def start() -> Processes:
    """Join the group that torchrun describes, or stand alone. What torchrun started ends with it, as by SIGTERM."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(GRACE)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        return Processes(0, 1, device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(int(os.environ["RANK"]), world, device, dist.new_group(backend="gloo"))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- what a process trains: the model itself, DDP's copy of it, or its shards (FSDP2)


def spread(model: Any, processes: Processes, fsdp: bool, bf16: bool, layers_stay: bool) -> nn.Module:
    """The network to call in training steps, whose backward sums gradients over processes; ``model`` itself where it is alone.

    Args:
        fsdp: shard weights, gradients and optimizer state over the processes (in place); else every process has all of them.
        bf16: sharded weights are gathered in bfloat16; gradients are summed in float32, and the shards are float32.
        layers_stay: gathered decoder layers stay until the backward pass, for what reads their weights outside of their forward.
    """
    if processes.world == 1:
        return model
    if fsdp:
        shard(model, processes, bf16, layers_stay)
        return model
    return DistributedDataParallel(model)


def shard(model: Any, processes: Processes, bf16: bool, layers_stay: bool) -> None:
    """FSDP2: a unit for every decoder layer, one for the rest.

    The vision tower belongs to the rest: a batch without images does not run it, and a unit that only some processes run would
    have the others wait for ever. So does the head, which the losses read after the forward, when only the outermost unit is whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    try:
        text = family_of(model.model.config).language_model(decoder_of(model.model))
    except AttributeError as error:
        raise CompatibilityError(f"{error}: it cannot be sharded, train it without --fsdp") from None
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if bf16 else MixedPrecisionPolicy()
    for layer in text.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not layers_stay)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    model.model.get_input_embeddings().register_forward_hook(partial(_with_gradient, model))


def _with_gradient(model: nn.Module, embedding: nn.Module, given: Any, states: torch.Tensor) -> torch.Tensor:
    """Token embeddings that a gradient goes back to on every process: where only the projector trains, a batch without images would
    have no backward pass through the decoder layers, and the other processes would wait for this one's shards of them."""
    if not torch.is_grad_enabled() or states.requires_grad:
        return states
    return states + nothing_of(model).to(states.dtype)


def summed_loss(loss: torch.Tensor, network: nn.Module, processes: Processes) -> torch.Tensor:
    """The loss whose backward sums gradients over processes: each parameter in its graph, as collectives want them on every process."""
    if processes.world == 1:
        return loss
    if isinstance(network, DistributedDataParallel):
        loss = loss * processes.world  # DDP averages
    return loss + nothing_of(network)


def nothing_of(network: nn.Module) -> torch.Tensor:
    """0 with a gradient (0) to every parameter that is whole here: of sharded units the outermost is, in and behind its forward; the
    decoder layers run in every one anyway."""
    whole = [p for p in network.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    return 0.0 * torch.stack([p.reshape(-1)[0].float() for p in whole]).sum()


def summing(network: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around one of a step's micro-batches. DDP sums behind the last; shards are summed behind each, which keeps gradients sharded."""
    if last or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def gathered(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Whole tensors of a sharded model by name, on the CPU of the main process (empty elsewhere); None where it is not sharded.

    All processes call this. A tied tensor has one name, as in ``named_parameters``.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    named = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: one for name, one in found.items() if name in named}  # type: ignore[misc]
