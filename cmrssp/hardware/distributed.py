"""Several processes, one training: torchrun's environment, and what its processes tell each other.

    torchrun --nproc-per-node=4 train_ssp.py --method simclr --data DIR

With one process every function returns what it was given, and torch.distributed is not started. Only rank 0
prints, and writes what all ranks share. A collective (gather, mean, maximum) fails after `_TIMEOUT`, so that
no run hangs. A barrier waits as long as another rank works, and fails when a rank has failed.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_TIMEOUT = timedelta(seconds=50)
_FAILED = "failed"
_store: dist.Store | None = None
_barriers = 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    return rank() == 0


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def hide_bar() -> bool | None:
    """For tqdm's `disable`: only rank 0 shows a bar, and only in a terminal."""
    return None if is_main() else True


def start() -> None:
    """Meet the other processes. From here on only rank 0 prints."""
    global _store
    if world_size() > 1:
        _store, _, _ = next(dist.rendezvous("env://"))
        if not is_main():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open as long as the process lives


def connect(device: torch.device) -> None:
    """Open the process group: gloo for tensors on the CPU, nccl for tensors on a GPU."""
    if world_size() == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.PrefixStore("group", _store)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=_TIMEOUT)


def finish(*, failed: bool) -> None:
    """Leave the group; with `failed` the ranks that wait in a barrier fail as well."""
    if _store and failed:
        with suppress(RuntimeError):  # the store has gone with the process that held it
            _store.set(_FAILED, "1")
    elif dist.is_initialized():
        dist.destroy_process_group()


def print_error(message: str) -> None:
    """Print a line to stderr; the first rank prints what several have to say."""
    times = 1
    with suppress(RuntimeError):  # the store has gone with the process that held it
        times = _store.add(f"printed {message}", 1) if _store else 1
    if times == 1:
        print(message, file=sys.stderr, flush=True)


def is_process_lost(error: RuntimeError) -> bool:
    """Whether the error means that another process, or the connection to it, has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def barrier() -> None:
    """Wait for all ranks, however long they work. Raises DistError when one of them fails."""
    global _barriers
    if world_size() == 1:
        return
    _barriers += 1
    key = f"barrier {_barriers}"
    _store.add(key, 1)
    while _store.add(key, 0) < world_size():
        if _store.check([_FAILED]):
            raise dist.DistError("another process has failed")  # it has printed why
        time.sleep(0.02)


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block first, then the others run it."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def from_main(make: Callable[[], Any]) -> Any:
    """Call `make` on rank 0 only and return its result on all ranks."""
    found = [make() if is_main() else None]
    if world_size() > 1:
        barrier()
        dist.broadcast_object_list(found)
    return found[0]


def own_items(items: Sequence) -> Sequence:
    """The items that this rank works on: with n ranks every n-th, starting with the rank's number."""
    return items[rank() :: world_size()]


def merge(results: list) -> list:
    """The results of all ranks for their `own_items`, in the order of the items. Waits for the slowest."""
    if world_size() == 1:
        return results
    barrier()
    parts: list[list] = [[]] * world_size()
    dist.all_gather_object(parts, results)
    return [parts[i % world_size()][i // world_size()] for i in range(sum(map(len, parts)))]


def maximum(*numbers: int) -> list[int]:
    """The maximum of each number over the ranks: if one rank must save or stop, all do."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks, without gradient; the same bits on all of them."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def gather(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Concatenate the tensors of all ranks, of one shape, along `dim` in order of rank. The gradient of a
    rank's own tensor is the sum over all ranks. So if each rank computes the loss of the global batch, the
    mean over ranks that DDP takes is exactly the gradient of that loss.
    """
    return tensor if world_size() == 1 else _Gather.apply(tensor, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.dim = dim
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size(), ctx.dim)[rank()], None


def wrap(method: nn.Module, device: torch.device) -> nn.Module:
    """Wrap `method` in DDP. On GPUs its batch norms use the statistics of the global batch. Torch has no such
    norm for the CPU: there each rank normalises by its own part, and rank 0 keeps the running statistics.
    """
    if world_size() == 1:
        return method
    barrier()  # rank 0 may still be drawing
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(method)
    return DistributedDataParallel(method)


def broadcast_buffers(method: nn.Module) -> None:
    """Copy the buffers of rank 0 to all ranks, as the next forward pass of DDP would do."""
    for buffer in method.buffers() if world_size() > 1 else ():
        dist.broadcast(buffer, 0)
