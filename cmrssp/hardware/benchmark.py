"""How fast is a training on this machine, what is a step made of, and what could the device do?"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmrssp.data.batches import Batches
from cmrssp.hardware import distributed
from cmrssp.hardware.device import AMP_TYPES, untuned
from cmrssp.runs.progress import duration
from cmrssp.ssp.method import Method
from cmrssp.training import Settings, Step, step_generator

_MIN_ROUNDS = 5
_ROUND_S = 1.0  # of one kind of work: rounds are short, so that a slow minute of the machine meets every kind
_WARM_UP = 3
_OVERWRITE = {"aten::copy_", "aten::zero_", "aten::fill_", "aten::normal_"}  # their target is not read


@dataclass
class Measured:
    """Of one kind of work, slices per second in each round."""

    title: str
    rates: list[float]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def of(self, other: "Measured") -> str:
        """This rate as a share of the other: median and range over the rounds."""
        shares = [a / b for a, b in zip(self.rates, other.rates, strict=True)]
        share, low, high = statistics.median(shares), min(shares), max(shares)
        return f"{self.title} / {other.title}: {share:.3f} ({low:.3f} to {high:.3f})"


def run(method: Method, batches: Batches, settings: Settings, num_steps: int) -> None:
    """Print how long at least `num_steps` steps take. Each round measures every kind of work, every second
    round in reverse order. The learning rate is 0: the weights do not change.
    """
    device, size, share = batches.device, batches.batch_size, batches.share
    step = Step(method, batches, replace(settings, lr=0.0, final_lr=0.0))
    stream = batches.epochs(0, 10**9)
    fixed = next(stream)
    print(
        f"benchmark: {method.name}, batches of {size} slices at {method.image_size} px, channels "
        f"{' '.join(map(str, method.encoder.channels))}, mixed precision {settings.amp}, compile "
        f"{'on' if settings.compile else 'off'}, device cache {'on' if batches.resident else 'off'}, grad "
        f"checkpoint {'on' if method.encoder.stages[0].recompute else 'off'}"
    )
    print(f"on: {name(device)}, torch {torch.__version__}", flush=True)
    with untuned(settings.compile):
        flops, moved = work(lambda: step(fixed, 0, 0))
    gradients = None

    def network(views: dict[str, torch.Tensor]) -> None:
        nonlocal gradients
        with step.autocast():
            outputs = [output for output in method.outputs(views) if output.requires_grad]
        gradients = gradients or [torch.full_like(output, 1 / output.numel()) for output in outputs]
        torch.autograd.backward(outputs, gradients)
        method.zero_grad(set_to_none=True)

    waited = 0.0

    def real(i: int) -> None:
        nonlocal waited
        began = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - began
        step(batch, 0, i % len(batches))

    views = method.views(fixed, step_generator(settings.seed, 0, 0))
    kinds: dict[str, Callable[[int], object]] = {
        "real path": real,
        "step alone": lambda i: step(fixed, 0, i % len(batches)),
        "augmentation alone": lambda i: method.views(fixed, step_generator(settings.seed, 0, i)),
        "network alone": lambda i: network(views),
    }
    for act in kinds.values():
        for i in range(_WARM_UP if device.type == "cuda" or settings.compile else 1):
            act(i)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    waited, done = 0.0, {title: Measured(title, []) for title in kinds}
    fitting = math.ceil(_ROUND_S / timed(lambda: step(fixed, 0, 0), device))
    (each,) = distributed.maximum(min(num_steps, fitting))  # all ranks take as many steps
    rounds = max(_MIN_ROUNDS, math.ceil(num_steps / each))
    for number in range(rounds):
        for title, act in list(kinds.items())[:: 1 if number % 2 else -1]:
            seconds = timed(lambda act=act: [act(i) for i in range(each)], device)
            done[title].rates.append(each * size / seconds)
    stream.close()

    print(f"\n{'':<20}{'slices/s':>10}   {f'in {rounds} rounds of {each} steps':<28}{'s a step':>10}")
    for measured in done.values():
        spread = f"{min(measured.rates):.4g} to {max(measured.rates):.4g}"
        print(f"{measured.title:<20}{measured.rate:>10.4g}   {spread:<28}{size / measured.rate:>10.4g}")
    path, alone, _, bare = done.values()
    waiting = waited / sum(each * size / rate for rate in path.rates)
    print(f"\n{path.of(alone)}; waiting for slices: {100 * waiting:.1f} % of the time")
    print(alone.of(bare))
    print(f"peak memory: {peak_memory(device) / 1e9:.2f} GB")
    peak, bandwidth = ceilings(device, settings.amp)
    floor = max(flops / peak, moved / bandwidth) / size
    bound = "arithmetic" if flops / peak > moved / bandwidth else "memory"
    print(
        f"a slice: {flops / share / 1e9:.3g} GFLOP, {moved / share / 1e9:.3g} GB in and out of operators; "
        f"the device: {peak / 1e12:.3g} TFLOP/s in a matrix product, {bandwidth / 1e9:.3g} GB/s in a copy"
    )
    print(
        f"floor: {1 / floor:.4g} slices/s, set by {bound}; step alone takes "
        f"{1 / (alone.rate * floor):.2f} times as long"
    )
    left = len(batches) * settings.epochs * size / path.rate
    print(
        f"the whole training: {settings.epochs} epochs x {len(batches)} steps, {duration(left)} (validation "
        "not counted)"
    )


def timed(act: Callable[[], object], device: torch.device) -> float:
    """Seconds, to the end of what the device does of it."""
    _wait(device)
    began = time.perf_counter()
    act()
    _wait(device)
    return time.perf_counter() - began


def work(act: Callable[[], object]) -> tuple[int, int]:
    """(floating-point operations of convolutions and matrix products, bytes that the operators read and write
    when each touches its tensors once) of `act`. Compiled, it may need fewer bytes.
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
            tensors = _tensors([given.get(argument.name)])
            writes = argument.alias_info is not None and argument.alias_info.is_write
            written += tensors if writes else []
            read += [] if writes and (argument.is_out or schema.name in _OVERWRITE) else tensors
        held = {tensor.untyped_storage().data_ptr() for tensor in (*read, *written)}
        written += [t for t in _tensors([result]) if t.untyped_storage().data_ptr() not in held]
        if written and "empty" not in schema.name:
            self.bytes += sum(t.numel() * t.element_size() for t in (*read, *written))
        return result


def _tensors(values) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def ceilings(device: torch.device, amp: str) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, byte/s of a large copy), the best of several. With float32 on a GPU
    the product is in TF32 where convolutions may use it.
    """
    side, length = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    if device.type == "cpu" and amp != "off":
        side = 512  # many a CPU has no units for bfloat16
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


def name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
