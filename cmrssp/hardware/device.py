"""The device of a run, the processor cores that it may use, and how torch is set up for it."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from cmrssp.errors import UserError
from cmrssp.hardware import distributed

AMP_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# slices, all epochs together: on an H100 compiling takes 20 s with the kernels in the cache and a minute
# without; it saves 0.5 ms a slice of a fine-tuning with batches of 32, and 0.1 ms of MIM with 128
COMPILE_FROM = 200_000


def resolve_device(name: str) -> torch.device:
    """The device for --device, printed; `auto` is a GPU if torch sees one. Under torchrun each process of a
    machine takes its own GPU. Torch's threads are limited to the cores that this process may use.
    """
    expected = "--device: expected auto, cpu, cuda or cuda:N, got"
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"{expected} {name}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UserError(f"{expected} {name}")
    cuda, present, processes = device.type == "cuda", torch.cuda.device_count(), distributed.world_size()
    if cuda and (device.index or 0) >= present:
        raise UserError(f"--device {name}: torch sees {present} GPUs; use one of them, or cpu")
    if processes > 1 and cuda:
        if device.index is not None:
            why = "torchrun gives every process its own GPU"
            raise UserError(f"--device {name}: {why}; expected auto, cuda or cpu")
        if (wanted := distributed.local_world_size()) > present:
            how = "start at most as many processes, or add --device cpu"
            raise UserError(f"--nproc-per-node={wanted}: torch sees {present} GPUs on this machine; {how}")
        device = torch.device("cuda", distributed.local_rank())
        torch.cuda.set_device(device)
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    each = f"{processes} processes, each with " if processes > 1 else ""
    what = torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads"
    print(f"device: {each}{what}")
    distributed.connect(device)
    return device


def available_cores() -> int:
    """The cores that this process may use: its affinity, and the quota of its container (cgroup v2 or v1)."""
    cores = len(os.sched_getaffinity(0))
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):  # the other version of cgroups, or "max", which is no limit
            words = " ".join(Path("/sys/fs/cgroup", name).read_text() for name in files).split()
            quota, period = map(int, words)
            if quota > 0:
                return min(cores, math.ceil(quota / period))
    return cores


def resolve_amp(amp: str, device: torch.device) -> str:
    if amp == "fp16" and device.type != "cuda":
        print("mixed precision: off (fp16 needs a GPU)")
        return "off"
    return amp


def resolve_compile(choice: str, device: torch.device, *, norm: str, num_slices: int) -> bool:
    """Whether to torch.compile; "auto": on a GPU, from COMPILE_FROM slices on."""
    if choice == "off" or (choice == "auto" and (device.type != "cuda" or num_slices < COMPILE_FROM)):
        return False
    if device.type == "cuda" and norm == "batch" and distributed.world_size() > 1:
        print("compile: off, torch cannot compile the batch norm that several GPUs share")
        return False
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
    except Exception as error:  # a missing or broken compiler can raise anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"compile: off, torch finds no working compiler ({first})")
        return False
    print(
        "compile: on; the first steps take about a minute, or 20 s if --cache has the kernels already; a GPU "
        "may need twice the memory"
    )
    return True


def resolve_graph(choice: str, device: torch.device, *, compiled: bool) -> bool:
    """Whether to replay the compiled networks as CUDA graphs: a graph is one launch; its kernels one by
    one can take the host longer than the GPU needs to run them.
    """
    if choice == "off" or device.type != "cuda" or not compiled:
        return False
    if distributed.world_size() > 1:
        print("graph: off, with several processes")
        return False
    print("graph: on")
    return True


def report_graph_fallback() -> None:
    """Print how many parts of the networks torch runs without a CUDA graph, if any."""
    from torch._dynamo.utils import counters  # seconds that a run without torch.compile does not need

    if skipped := counters["inductor"].pop("cudagraph_skips", 0):
        print(f"graph: {skipped} parts of the networks run without (why: TORCH_LOGS=perf_hints)", flush=True)


@contextmanager
def untuned(compiled: bool) -> Iterator[None]:
    """In this block compiled networks run uncompiled, and cuDNN does not search for the fastest algorithm:
    for shapes that occur rarely, compiling and searching would take longer than they save.
    """
    search = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        torch.backends.cudnn.benchmark = search


def prepare_torch(seed: int, deterministic: bool, cache: Path) -> None:
    """`cache`: where torch.compile keeps its kernels (torch takes another place if it is asked later)."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call takes seconds
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.benchmark = not deterministic
