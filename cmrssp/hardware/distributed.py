"""Several processes, one training: torchrun's environment, and what its processes tell each other.

    torchrun --nproc-per-node=4 train_ssp.py --method simclr --data DIR

With one process every function here is the identity, and torch.distributed is left alone. Rank 0 writes and
prints. Two ways to wait: a collective (gather, mean, highest) fails after `_TIMEOUT`, so that nothing hangs;
a barrier waits for as long as another rank works, and ends when one of them has failed.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_TIMEOUT = timedelta(seconds=50)
_POLL_S = 0.02
_FAILED = "failed"
_store: dist.Store | None = None
_meetings = 0


class Lost(RuntimeError):
    """Another process has failed; it has said why."""


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def local_rank() -> int:
    """The number of this process on its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", rank())) if world_size() > 1 else 0


def local_world_size() -> int:
    """The processes of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def hide_bar() -> bool | None:
    """tqdm's `disable`: one bar, and only in a terminal."""
    return None if is_main() else True


def start() -> None:
    """Meet the other processes. From here on rank 0 alone prints."""
    global _store
    if world_size() > 1 and _store is None:
        _store, _, _ = next(dist.rendezvous("env://"))
        if not is_main():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives


def connect(device: torch.device) -> None:
    """Open the process group: gloo for what lies on the CPU, nccl for what lies on a GPU."""
    if world_size() == 1 or dist.is_initialized():
        return
    start()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.PrefixStore("group", _store)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=_TIMEOUT)


def finish(*, failed: bool) -> None:
    """Leave the others; with `failed` those that wait for this process end, too."""
    if _store is None:
        return
    if failed:
        _try(lambda: _store.set(_FAILED, "1"))
    elif dist.is_initialized():
        dist.destroy_process_group()


def say(message: str) -> None:
    """A line on stderr. What several ranks have to say is said once, by the first of them."""
    if _store is None or _try(lambda: _store.add(f"said {message}", 1)) in (1, None):
        print(message, file=sys.stderr, flush=True)


def lost(error: RuntimeError) -> bool:
    """Whether this error means that another process, or the connection to it, has ended."""
    return isinstance(error, Lost | dist.DistError) or "gloo" in str(error)


def barrier() -> None:
    """Wait for all ranks, however long they work. Raises Lost when one of them fails meanwhile."""
    if world_size() > 1:
        _meet()


@contextmanager
def main_first() -> Iterator[None]:
    """The block runs on rank 0, and when it is through on the others."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def from_main(make: Callable[[], Any]) -> Any:
    """The result of `make`, called on rank 0 only, on all ranks; it must be JSON-serialisable."""
    if world_size() == 1:
        return make()
    key = f"from main {_meetings + 1}"
    if is_main():
        _store.set(key, json.dumps(make()))
    _meet()
    return json.loads(_store.get(key))


def share(items: Sequence) -> Sequence:
    """The items that this rank works on: every n-th, with n ranks, starting with the rank's number."""
    return items[rank() :: world_size()]


def merge(results: list) -> list:
    """What all ranks have made of their `share`, in the order of the items. Waits for the slowest."""
    if world_size() == 1:
        return results
    barrier()
    parts: list[list] = [[]] * world_size()
    dist.all_gather_object(parts, results)
    return [parts[i % world_size()][i // world_size()] for i in range(sum(map(len, parts)))]


def highest(*numbers: int) -> list[int]:
    """Of each number the largest that a rank has: what one of them wants, all do."""
    if world_size() == 1:
        return [int(number) for number in numbers]
    tensor = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """Over the ranks, without gradient; the same bits on all of them."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def gather(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The tensors of all ranks, which must have one shape, concatenated along `dim` in the ranks' order.

    With gradient: that of a rank's own tensor is the sum over what all ranks compute from it. So where each
    of them computes the loss of the global batch, the mean over ranks that DDP takes is exactly its gradient.
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
    """`method` under DDP, its batch norms with the statistics of the global batch where it lies on a GPU.

    On a CPU, where torch has no such norm, each rank normalises by its own share, and the running statistics
    are those of rank 0.
    """
    if world_size() == 1:
        return method
    barrier()  # rank 0 may still be drawing
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(method)
    return DistributedDataParallel(method)


def share_buffers(method: nn.Module) -> None:
    """The buffers of rank 0 on all ranks, as DDP's next forward would do it."""
    if world_size() > 1:
        for buffer in method.buffers():
            dist.broadcast(buffer, 0)


def _meet() -> None:
    global _meetings
    _meetings += 1
    key = f"meeting {_meetings}"
    _store.add(key, 1)
    while _store.add(key, 0) < world_size():
        if _store.check([_FAILED]):
            raise Lost("another process has failed")
        time.sleep(_POLL_S)


def _try(call: Callable[[], Any]) -> Any:
    """None where the store is gone, and with it the process that held it."""
    try:
        return call()
    except RuntimeError:
        return None
