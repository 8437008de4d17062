"""How much memory a training will need, before it starts."""

import copy
import os
from dataclasses import replace

import torch

from cmrssp.data.batches import Batches
from cmrssp.data.device_cache import DeviceCache
from cmrssp.errors import UserError
from cmrssp.hardware import distributed
from cmrssp.runs.settings import Settings
from cmrssp.ssp.method import Method

_GB = 1e9
_RESERVE = 2 * _GB  # kept free besides the slices, for batches under way and libraries
_MARGIN = 1.3  # the estimate leaves out gradients under way and the work space of libraries
_COMPILED = 2.1  # in place of it: graphs keep memory of their own (SimCLR 2.03 of the estimate, MIM 1.25)


def check(
    method: Method,
    batches: Batches,
    settings: Settings,
    device_cache: str = "off",
    *,
    uncompile: bool = False,
) -> Settings:
    """Print the estimated memory. Raises UserError if the device has less, with a batch size that fits.

    With `device_cache` on, or auto on a GPU that has room for them, copies the slices to the device now.
    Returns the settings, with `uncompile` not compiled if they may not fit compiled.
    """
    size, ranks, device, amp = batches.batch_size, distributed.world_size(), batches.device, settings.amp
    if size < method.fewest_slices:
        raise UserError(
            f"--batch-size: {method.name} compares the slices of a batch, expected at least "
            f"{method.fewest_slices} of them, got {size} ({len(batches.slices)} to train on)"
        )
    factor = 2 ** (len(method.encoder.channels) - 1)
    fewest = batches.per_rank * min(number * (side // factor) ** 2 for side, number in method.view_sizes())
    if method.encoder.norm == "batch" and fewest < 2:
        raise UserError(
            f"--batch-size {size}: batch norm needs more than one value per channel at the bottleneck, got "
            f"one; use --batch-size {2 * ranks}, fewer --channels or a larger --image-size"
        )
    fixed, per_slice = estimate(method, batches, amp=amp)
    needed, present = fixed + per_slice * batches.per_rank, capacity(device)
    print(f"memory: about {needed / _GB:.1f} of {present / _GB:.1f} GB")
    if needed > present:
        fitting = int((0.9 * present - fixed) / per_slice) * ranks
        hint = f"--batch-size {fitting}" if fitting > 0 else "fewer --channels or a smaller --image-size"
        sizes = f"this training needs about {needed / _GB:.0f} GB, {device} has {present / _GB:.0f} GB"
        raise UserError(f"--batch-size {size}: {sizes}; try {hint}" + ", or --amp fp16" * (amp == "off"))
    if uncompile and settings.compile and _COMPILED * needed > present:
        print(f"compile: off after all, it could need {_COMPILED * needed / _GB:.1f} GB; --compile on tries")
        settings = replace(settings, compile=False, graph=False)
    if device_cache == "on" or (device_cache == "auto" and device.type == "cuda"):
        slices = DeviceCache.needs(batches.slices, labelled=batches.labelled, motion=batches.motion)
        room = free(device) - (_COMPILED if settings.compile else _MARGIN) * needed - _RESERVE
        sizes = f"slices take {slices / _GB:.1f} GB, {max(room, 0) / _GB:.1f} GB are free besides training"
        if slices <= room:
            print(f"device cache: on, {sizes}")
            batches.keep_on_device()
        elif device_cache == "on":
            raise UserError(f"--device-cache on: {sizes}; use auto or off, or a smaller --batch-size")
        else:
            print(f"device cache: off, {sizes}; they are read ahead")
    return settings


def estimate(method: Method, batches: Batches, *, amp: str) -> tuple[float, float]:
    """(bytes for any batch: weights, gradients, momentum; bytes per slice: what autograd keeps), by running a
    copy of the method forward on two slices on the CPU and counting what it keeps for the backward pass.
    """
    distributed.barrier()  # the losses of some methods gather from all ranks
    trial = copy.deepcopy(method).cpu().train()
    batch = {key: value.cpu() for key, value in next(iter(batches.in_order(2))).items()}
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in trial.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    views = trial.views(batch, torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trial(views, 0.0)
    given = sum(view.untyped_storage().nbytes() for view in views.values())
    activations = sum(kept.values()) * (1.0 if amp == "off" else 0.5)
    weights = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in trial.parameters())
    return weights, (activations + given) / len(batch["image"])


def capacity(device: torch.device) -> float:
    """Bytes of memory that the device has; on a CPU those of the machine divided among its processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / distributed.local_world_size()


def free(device: torch.device) -> float:
    """Bytes that are not used now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / distributed.local_world_size()
