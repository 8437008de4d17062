"""How fast a training runs on this machine, what its step is made of, and what the device could do.

`python -m cmrssp.hardware --compile on` measures all objectives in 200 s, if --cache has the kernels. Below
are medians in slices/s with the paper's network, 256 px, 70 ACDC patients, torch 2.11, compiled, as
CUDA graphs; floor: the device's own bandwidth in a copy and rate in a matrix product. An NVIDIA H100 80 GB
(2026-11-27), on which supervised was not measured by this command (PCL and motion miss the goal of 2.0):

    objective, batch, precision   real path   step   network    views   step / floor   memory
    SimCLR 224 fp16                    3343   3440      3596    54300           1.62   30.7 GB
    PCL 64 TF32                        1285   1301      1346    21400           2.22   11.4 GB
    DINO 64 fp16                       1477   1491      1655     7600           1.67   15.0 GB
    MIM 128 fp16                       2290   2346      2437    30000           1.92   13.8 GB
    motion 32 fp16                     1713   1881      2083     9100           2.17    4.2 GB

An H200 (2026-11-27; its memory is faster, so that its floor is lower; the memory column holds a second set of
graphs, of the network alone):

    SimCLR 224 fp16                    3832   3938      4077    71200           1.97   32.2 GB
    PCL 64 TF32                        1494   1509      1564    18900           2.62   11.6 GB
    DINO 64 fp16                       1693   1717      1913     5630           2.01   15.7 GB
    MIM 128 fp16                       2633   2691      2796    42300           2.32   15.2 GB
    motion 32 fp16                     2094   2155      2365    14900           2.63    4.3 GB
    supervised 32 TF32                 1043   1065      1108     9130           2.76    7.4 GB
    supervised 32 fp16                 1958   2197      2435    10100           2.45    4.1 GB

`tests/hardware/nnunet_step.py` on the H100, fp16, 32 synthetic slices: nnU-Net's recipe, compiled, 918
slices/s; ours with augmentation 2033 (2.22 times, in five rounds 2.09 to 2.24), not compiled 1054. Whole
fine-tunings reached 1890 to 1940 slices/s there, in float32 980. Of the 15.75 ms of a compiled step (1.9
times its floor) the device worked 15.3 in 743 kernels: convolutions 8.0, batch norm with activations and
concatenation 3.9, optimiser 0.41, views 0.33, copies inside the transposed convolutions 0.65.

All this was before compiled networks made a product of their first convolution, which is 1.035 times as fast
(2054 to 2125 slices/s), and before the losses of motion and MIM were compiled. Transposed convolutions as
products gave 1.01 times and were left out.

bf16 is slower than fp16 where networks are not compiled: cuDNN has a batch norm for channels-last fp16, and
for bf16 torch's own kernels run (32 x 32 x 256 x 256, forward and backward: 0.60 and 1.43 ms; convolutions,
transposed ones and activations within 1 to 19 %).
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
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

PARTS = REAL_PATH, STEP, VIEWS, NETWORK = "real path", "step alone", "augmentation alone", "network alone"
_ROUNDS = 5  # at least
_ROUND_S = 1.0  # for each part; rounds are short, so that a slow minute of the machine meets every part
_WARM_UP = 4  # steps, the first of which compile and capture
_OVERWRITE = {"aten::copy_", "aten::zero_", "aten::fill_", "aten::normal_"}  # they do not read their target


@dataclass(frozen=True)
class Measurement:
    """All that is measured of one training. Work is per slice, limits are those of the device."""

    rates: dict[str, list[float]]  # slices per second of each part in each round
    steps_per_round: int
    waiting: float  # fraction of the real path's time in which it waits for slices
    peak_memory: int  # bytes: what torch reserved on a GPU, graphs too; the whole process on a CPU
    flops: float
    moved: float  # bytes in and out of operators
    peak: float  # FLOP/s
    bandwidth: float  # byte/s

    def rate(self, part: str) -> float:
        return statistics.median(self.rates[part])

    def ratio(self, part: str, other: str) -> str:
        """The ratio of two rates: median and range over the rounds."""
        ratios = [a / b for a, b in zip(self.rates[part], self.rates[other], strict=True)]
        return f"{part} / {other}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"

    @property
    def floor(self) -> float:
        """Seconds a slice would take if the device did nothing but its arithmetic, or its memory traffic."""
        return max(self.flops / self.peak, self.moved / self.bandwidth) / distributed.world_size()

    @property
    def times_floor(self) -> float:
        return 1 / (self.rate(STEP) * self.floor)


def run(method: Method, batches: Batches, settings: Settings, num_steps: int) -> None:
    """Measure at least `num_steps` steps and print what was found."""
    encoder, size = method.encoder, batches.batch_size
    used = {"compile": settings.compile, "graph": settings.graph, "device cache": batches.on_device}
    used["grad checkpoint"] = encoder.stages[0].recompute
    print(
        f"benchmark: {method.name}, batches of {size} slices at {method.image_size} px, channels "
        f"{' '.join(map(str, encoder.channels))}, mixed precision {settings.amp}"
        + "".join(f", {name} {'on' if on else 'off'}" for name, on in used.items())
        + f", torch {torch.__version__}",
        flush=True,
    )
    found = measure(method, batches, settings, num_steps)
    how = f"in {len(found.rates[STEP])} rounds of {found.steps_per_round} steps"
    print(f"\n{'':<20}{'slices/s':>10}   {how:<28}{'s a step':>10}")
    for part, rates in found.rates.items():
        rate, spread = found.rate(part), f"{min(rates):.4g} to {max(rates):.4g}"
        print(f"{part:<20}{rate:>10.4g}   {spread:<28}{size / rate:>10.4g}")
    bound = "arithmetic" if found.flops / found.peak > found.moved / found.bandwidth else "memory"
    left = duration(len(batches) * settings.epochs * size / found.rate(REAL_PATH))
    print(
        f"\n{found.ratio(REAL_PATH, STEP)}; waiting for slices: {100 * found.waiting:.1f} % of the time\n"
        f"{found.ratio(STEP, NETWORK)}\n"
        f"peak memory: {found.peak_memory / 1e9:.2f} GB\n"
        f"a slice: {found.flops / 1e9:.3g} GFLOP, {found.moved / 1e9:.3g} GB in and out of operators; "
        f"the device: {found.peak / 1e12:.3g} TFLOP/s in a matrix product, {found.bandwidth / 1e9:.3g} GB/s "
        f"in a copy\n"
        f"floor: {1 / found.floor:.4g} slices/s, set by {bound}; step alone takes {found.times_floor:.2f} "
        f"times as long\n"
        f"the whole training: {settings.epochs} epochs x {len(batches)} steps, {left} without validation"
    )


def measure(method: Method, batches: Batches, settings: Settings, num_steps: int) -> Measurement:
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
    waits: list[float] = []

    def real_path(number: int) -> None:
        began = time.perf_counter()
        read = next(stream)
        waits.append(time.perf_counter() - began)
        step(read, 0, number % len(batches))

    def network(_: int) -> None:
        if settings.graph:
            torch.compiler.cudagraph_mark_step_begin()
        with step.autocast():
            outputs = [output for output in method.outputs(views) if output.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        method.zero_grad(set_to_none=True)

    parts: dict[str, Callable[[int], object]] = {
        REAL_PATH: real_path,
        STEP: lambda number: step(batch, 0, number % len(batches)),
        VIEWS: lambda number: method.views(batch, step_generator(settings.seed, 0, number)),
        NETWORK: network,
    }
    memory, on_gpu = 0, device.type == "cuda"
    for part, act in parts.items():
        for number in range(_WARM_UP if on_gpu or settings.compile else 1):
            act(number)
        if part == STEP and on_gpu:  # before the networks alone, whose graphs no training has
            torch.cuda.empty_cache()  # of the uncompiled step whose work was counted
            torch.cuda.reset_peak_memory_stats(device)
            act(0)
            memory = torch.cuda.max_memory_reserved(device)
    waits.clear()
    rates: dict[str, list[float]] = {part: [] for part in parts}
    steps = math.ceil(_ROUND_S / timed(lambda: step(batch, 0, 0), device))
    (steps,) = distributed.maximum(min(num_steps, steps))  # the same on all ranks
    for number in range(max(_ROUNDS, math.ceil(num_steps / steps))):
        for part, act in list(parts.items())[:: 1 if number % 2 else -1]:
            seconds = timed(lambda act=act: [act(i) for i in range(steps)], device)
            rates[part].append(steps * size / seconds)
    stream.close()
    waiting = sum(waits) / sum(steps * size / rate for rate in rates[REAL_PATH])
    memory = memory or 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    flops, moved = flops / batches.per_rank, moved / batches.per_rank
    return Measurement(rates, steps, waiting, memory, flops, moved, *ceilings(device, settings.amp))


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
    side, length = (8192, 2**28) if device.type == "cuda" else (1024, 2**26)
    a, b = (torch.randn(side, side, device=device).to(AMP_TYPES.get(amp, torch.float32)) for _ in range(2))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    product = min(timed(lambda: a @ b, device) for _ in range(8))
    torch.backends.cuda.matmul.allow_tf32 = allowed
    source = torch.zeros(length, dtype=torch.float32, device=device)
    target = torch.ones_like(source)
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(8))
    return 2 * side**3 / product, 2 * 4 * length / copy
