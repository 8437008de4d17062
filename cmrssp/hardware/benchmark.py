"""How fast a training runs on this machine, what its step is made of, and what the device could do.

`python -m cmrssp.hardware` measures all objectives. An NVIDIA H100 80 GB (torch 2.11, 70 ACDC patients, 256
px, the paper's network, not compiled, 2026-11) gave these medians in slices/s, before convolutions lost their
bias and DINO made its crops at once; floor: the device's own 2.95 TB/s and 740 TFLOP/s (fp16):

    objective, batch, precision   real path   step   network    views   step / floor   peak memory
    MIM 128 fp16                       1760   1791      1873    32000           2.55       12.2 GB
    SimCLR 224 fp16                    2292   2332      2459    59000           2.45       15.5 GB
    DINO 64 fp16                        922    939      1073     3100           2.76        8.1 GB
    PCL 64 TF32                        1076   1088      1131    14000           2.68        8.9 GB
    supervised 32 TF32                  751    759       808    15700           2.78        6.5 GB
    supervised 32 fp16                  980    949      1496    12000           4.0         3.5 GB

Without the bias, compiled and replayed as CUDA graphs (2026-11-26), a fine-tuning in fp16 with batches of 32
went at 1,930 slices/s whenever no other process used the GPU (the fastest epochs of seven trainings, slices
and views included), and motion with 32 at 1,950. While seven other processes compiled, MIM with 128 had 1,950
on the real path and 2,157 for the step alone, 2.12 times its floor.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmrssp.data.batches import Batches
from cmrssp.hardware import distributed
from cmrssp.hardware.device import AMP_TYPES, untuned
from cmrssp.runs.progress import duration
from cmrssp.runs.settings import Settings
from cmrssp.ssp.method import Method
from cmrssp.training import Step, step_generator

_ROUND_S = 1.0  # for each part; rounds are short, so that a slow minute of the machine meets every part
_WARM_UP = 4  # steps, the first of which compile and capture
_OVERWRITE = {"aten::copy_", "aten::zero_", "aten::fill_", "aten::normal_"}  # they do not read their target


@dataclass(frozen=True)
class Speed:
    """What one part of the training takes: slices per second in each round."""

    name: str
    rates: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    def relative_to(self, other: "Speed") -> str:
        """The ratio of this rate to the other: median and range over the rounds."""
        ratios = [a / b for a, b in zip(self.rates, other.rates, strict=True)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        return f"{self.name} / {other.name}: {middle:.3f} ({low:.3f} to {high:.3f})"


@dataclass(frozen=True)
class Measurement:
    """All that is measured of one training. Work is per slice, limits are those of the device."""

    real_path: Speed
    step: Speed
    views: Speed
    network: Speed
    steps_per_round: int
    waiting: float  # fraction of the real path's time in which it waits for slices
    peak_memory: int  # bytes
    flops: float
    moved: float  # bytes in and out of operators
    peak: float  # FLOP/s
    bandwidth: float  # byte/s

    @property
    def floor(self) -> float:
        """Seconds a slice would take if the device did nothing but its arithmetic, or its memory traffic."""
        return max(self.flops / self.peak, self.moved / self.bandwidth) / distributed.world_size()

    @property
    def times_floor(self) -> float:
        return 1 / (self.step.median * self.floor)


def run(method: Method, batches: Batches, settings: Settings, num_steps: int) -> None:
    """Measure at least `num_steps` steps and print what was found."""
    encoder, size = method.encoder, batches.batch_size
    used = {"compile": settings.compile, "graph": settings.graph, "device cache": batches.on_device}
    used["grad checkpoint"] = encoder.stages[0].recompute
    print(
        f"benchmark: {method.name}, batches of {size} slices at {method.image_size} px, channels "
        f"{' '.join(map(str, encoder.channels))}, mixed precision {settings.amp}"
        + "".join(f", {name} {'on' if on else 'off'}" for name, on in used.items())
    )
    print(f"on: {device_name(batches.device)}, torch {torch.__version__}", flush=True)
    found = measure(method, batches, settings, num_steps=num_steps)
    rounds = len(found.step.rates)
    how = f"in {rounds} rounds of {found.steps_per_round} steps"
    print(f"\n{'':<20}{'slices/s':>10}   {how:<28}{'s a step':>10}")
    for speed in (found.real_path, found.step, found.views, found.network):
        spread = f"{min(speed.rates):.4g} to {max(speed.rates):.4g}"
        print(f"{speed.name:<20}{speed.median:>10.4g}   {spread:<28}{size / speed.median:>10.4g}")
    waiting = f"waiting for slices: {100 * found.waiting:.1f} % of the time"
    print(f"\n{found.real_path.relative_to(found.step)}; {waiting}")
    print(found.step.relative_to(found.network))
    print(f"peak memory: {found.peak_memory / 1e9:.2f} GB")
    each = f"{found.flops / 1e9:.3g} GFLOP, {found.moved / 1e9:.3g} GB in and out of operators"
    limits = (
        f"{found.peak / 1e12:.3g} TFLOP/s in a matrix product, {found.bandwidth / 1e9:.3g} GB/s in a copy"
    )
    print(f"a slice: {each}; the device: {limits}")
    bound = "arithmetic" if found.flops / found.peak > found.moved / found.bandwidth else "memory"
    times = f"step alone takes {found.times_floor:.2f} times as long"
    print(f"floor: {1 / found.floor:.4g} slices/s, set by {bound}; {times}")
    left = duration(len(batches) * settings.epochs * size / found.real_path.median)
    print(f"the whole training: {settings.epochs} epochs x {len(batches)} steps, {left} without validation")


def measure(
    method: Method, batches: Batches, settings: Settings, *, num_steps: int, fewest_rounds: int = 5
) -> Measurement:
    """Time the real path (slices, views, step), the step on one batch, its views, and its networks.

    Each round times every part, every second round in reverse order. The learning rate is 0, so that the
    weights do not change.
    """
    device, size = batches.device, batches.batch_size
    step = Step(method, batches, replace(settings, lr=0.0, final_lr=0.0))
    stream = batches.epochs(0, 10**9)
    batch = next(stream)
    with untuned(settings.compile):
        flops, moved = work(lambda: step(batch, 0, 0))
    views = method.views(batch, step_generator(settings.seed, 0, 0))
    gradients, waited = None, 0.0

    def network(_: int) -> None:
        nonlocal gradients
        if settings.graph:
            torch.compiler.cudagraph_mark_step_begin()
        with step.autocast():
            outputs = [output for output in method.outputs(views) if output.requires_grad]
        gradients = gradients or [torch.full_like(output, 1 / output.numel()) for output in outputs]
        torch.autograd.backward(outputs, gradients)
        method.zero_grad(set_to_none=True)

    def real_path(number: int) -> None:
        nonlocal waited
        began = time.perf_counter()
        read = next(stream)
        waited += time.perf_counter() - began
        step(read, 0, number % len(batches))

    parts: dict[str, Callable[[int], object]] = {
        "real path": real_path,
        "step alone": lambda number: step(batch, 0, number % len(batches)),
        "augmentation alone": lambda number: method.views(batch, step_generator(settings.seed, 0, number)),
        "network alone": network,
    }
    for act in parts.values():
        for number in range(_WARM_UP if device.type == "cuda" or settings.compile else 1):
            act(number)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    waited, rates = 0.0, {name: [] for name in parts}
    steps = math.ceil(_ROUND_S / timed(lambda: step(batch, 0, 0), device))
    (steps,) = distributed.maximum(min(num_steps, steps))  # the same on all ranks
    for number in range(max(fewest_rounds, math.ceil(num_steps / steps))):
        for name, act in list(parts.items())[:: 1 if number % 2 else -1]:
            seconds = timed(lambda act=act: [act(i) for i in range(steps)], device)
            rates[name].append(steps * size / seconds)
    stream.close()
    waiting = waited / sum(steps * size / rate for rate in rates["real path"])
    flops, moved, memory = flops / batches.per_rank, moved / batches.per_rank, peak_memory(device)
    speeds = (Speed(name, rates[name]) for name in parts)
    return Measurement(*speeds, steps, waiting, memory, flops, moved, *ceilings(device, settings.amp))


def timed(act: Callable[[], object], device: torch.device) -> float:
    """The seconds until the device has done all of `act`."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else torch.cpu.synchronize
    wait()
    began = time.perf_counter()
    act()
    wait()
    return time.perf_counter() - began


def work(act: Callable[[], object]) -> tuple[int, int]:
    """(floating-point operations of convolutions and matrix products, bytes that the operators read and write
    if each touches its tensors once) of `act`. Compiled, it may need fewer bytes.
    """
    from torch.utils.flop_counter import FlopCounterMode  # half a second that no training needs

    with FlopCounterMode(display=False) as counter, _Traffic() as traffic:
        act()
    return counter.get_total_flops(), traffic.bytes


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write. A view moves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        schema, read, written = operator._schema, [], []
        given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **(kwargs or {})}
        for argument in schema.arguments:
            tensors = _tensors(given.get(argument.name))
            writes = argument.alias_info is not None and argument.alias_info.is_write
            written += tensors if writes else []
            read += [] if writes and (argument.is_out or schema.name in _OVERWRITE) else tensors
        held = {tensor.untyped_storage().data_ptr() for tensor in (*read, *written)}
        written += [t for t in _tensors(result) if t.untyped_storage().data_ptr() not in held]
        if written and "empty" not in schema.name:
            self.bytes += sum(t.numel() * t.element_size() for t in (*read, *written))
        return result


def _tensors(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


@cache
def ceilings(device: torch.device, amp: str) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, byte/s of a large copy), each the best of several. On a GPU a
    float32 product uses TF32 if convolutions may.
    """
    side, length = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    if device.type == "cpu" and amp != "off":
        side = 512  # many CPUs have no units for bfloat16
    a, b = (torch.randn(side, side, device=device).to(AMP_TYPES.get(amp, torch.float32)) for _ in range(2))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    product = min(timed(lambda: a @ b, device) for _ in range(8))
    torch.backends.cuda.matmul.allow_tf32 = allowed
    source = torch.zeros(length, dtype=torch.float32, device=device)
    target = torch.ones_like(source)
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(8))
    return 2 * side**3 / product, 2 * 4 * length / copy


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return getrusage(RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"
