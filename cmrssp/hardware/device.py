"""Which device a run takes, and how torch is set up on it."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from cmrssp.errors import UserError
from cmrssp.hardware import distributed

AMP_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def available_cores() -> int:
    """The cores that this process may use: its affinity, and the quota of its container (cgroup v2 or v1)."""
    cores = len(os.sched_getaffinity(0))
    for limit in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):  # another version of cgroups; "max", which is no limit
            words = " ".join(Path("/sys/fs/cgroup", name).read_text() for name in limit).split()
            quota, period = map(int, words)
            if quota > 0:
                return min(cores, math.ceil(quota / period))
    return cores


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; under torchrun each process of a machine takes its own. Says what
    was taken.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: expected cpu, or one of {torch.cuda.device_count()} GPUs that torch sees"
        )
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    processes = distributed.world_size()
    if processes > 1 and device.type == "cuda":
        device = _own_gpu(name, device)
    each = f"{processes} processes, each with " if processes > 1 else ""
    if device.type == "cuda":
        print(f"device: {each}{torch.cuda.get_device_name(device)}")
    else:
        print(f"device: {each}{device.type}, {torch.get_num_threads()} threads")
    distributed.connect(device)
    return device


def _own_gpu(name: str, device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine."""
    if device.index is not None:
        raise UserError(
            f"--device {name}: torchrun gives every process a GPU of its own; expected auto, cuda or cpu"
        )
    present, wanted = torch.cuda.device_count(), distributed.local_world_size()
    if wanted > present:
        raise UserError(
            f"--nproc-per-node={wanted}: torch sees {present} GPUs on this machine; start at most as many "
            "processes, or add --device cpu"
        )
    torch.cuda.set_device(distributed.local_rank())
    return torch.device("cuda", distributed.local_rank())


def resolve_amp(amp: str, device: torch.device) -> str:
    if amp == "fp16" and device.type != "cuda":
        print("mixed precision: off (fp16 needs a GPU)")
        return "off"
    return amp


def resolve_compile(wanted: bool, device: torch.device, norm: str) -> bool:
    """False, and that is said, where torch.compile has no compiler to work with, or nothing to compile."""
    if wanted and device.type == "cuda" and norm == "batch" and distributed.world_size() > 1:
        print("--compile: off, torch does not compile the batch norm that several GPUs have in common")
        return False
    if wanted:
        try:
            torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
        except Exception as error:  # whatever a compiler that is absent or broken ends in
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"--compile: off, torch finds no compiler that works here ({first})")
            return False
    return wanted


@contextmanager
def untuned(compiled: bool) -> Iterator[None]:
    """Inside, compiled networks run uncompiled and cuDNN does not search for the fastest algorithm: for
    shapes that occur rarely, compiling and searching would take longer than they save.
    """
    tries = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        torch.backends.cudnn.benchmark = tries


def prepare_torch(seed: int, deterministic: bool) -> None:
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.benchmark = not deterministic
