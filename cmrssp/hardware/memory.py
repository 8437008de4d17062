"""How much memory a training will need, before it starts."""

import copy
import os

import torch

from cmrssp.data.batches import Batches
from cmrssp.data.device_cache import DeviceCache
from cmrssp.errors import UserError
from cmrssp.hardware import distributed
from cmrssp.ssp.method import Method

_GB = 1e9
_RESERVE = 2 * _GB  # beside the slices: batches on their way, libraries
_MARGIN = 1.3  # gradients on their way and the libraries' work space are not in the estimate


def check(
    method: Method, batches: Batches, *, amp: str, device: torch.device, device_cache: str = "off"
) -> None:
    """Print the estimate; raise UserError with a batch size that fits when the device has less. With
    `device_cache` on, or auto where a GPU has room for them, the slices go into the device's memory now.
    """
    if batches.batch_size < method.fewest_slices:
        raise UserError(
            f"--batch-size: {method.name} compares the slices of a batch with one another, expected at least "
            f"{method.fewest_slices} of them, got {batches.batch_size} ({len(batches.slices)} to train on)"
        )
    factor, ranks = 2 ** (len(method.encoder.channels) - 1), distributed.world_size()
    fewest = batches.share * min(number * (side // factor) ** 2 for side, number in method.view_sizes())
    if method.encoder.norm == "batch" and fewest < 2:
        raise UserError(
            f"--batch-size {batches.batch_size}: batch norm needs more than one value a channel, and the "
            "bottleneck of these --channels and this --image-size has one; use --batch-size "
            f"{2 * ranks} or a larger --image-size"
        )
    fixed, per_slice = estimate(method, batches, amp=amp)
    needed, present = fixed + per_slice * batches.share, capacity(device)
    print(f"memory: about {needed / _GB:.1f} of {present / _GB:.1f} GB")
    if needed > present:
        fitting = int((0.9 * present - fixed) / per_slice)
        hint = (
            f"try --batch-size {fitting * ranks}"
            if fitting >= 1
            else "try fewer --channels or a smaller --image-size"
        )
        raise UserError(
            f"--batch-size {batches.batch_size}: this training needs about {needed / _GB:.0f} GB, "
            f"{device} has {present / _GB:.0f} GB; {hint}"
            + ("" if amp != "off" else ", or --amp fp16 on a GPU")
        )
    _keep_slices(batches, device_cache, needed)


def _keep_slices(batches: Batches, wish: str, training: float) -> None:
    """Copy the slices into the device's memory if they fit beside the training (bytes); else say why not."""
    if wish == "off" or (wish == "auto" and batches.device.type == "cpu"):
        return
    slices = DeviceCache.needs(
        batches.store, batches.slices, labelled=batches.labelled, motion=batches.motion
    )
    room = free(batches.device) - _MARGIN * training - _RESERVE
    sizes = f"the slices take {slices / _GB:.1f} GB, {max(room, 0) / _GB:.1f} GB are free beside the training"
    if slices <= room:
        print(f"device cache: on, {sizes}")
        batches.keep_on_device()
    elif wish == "on":
        raise UserError(f"--device-cache on: {sizes}; use auto or off, or a smaller --batch-size")
    else:
        print(f"device cache: off, {sizes}; they are read ahead")


def estimate(method: Method, batches: Batches, *, amp: str) -> tuple[float, float]:
    """(bytes whatever the batch, bytes per slice), on the CPU: weights, gradients, momentum; what autograd
    keeps.

    A copy of the method runs forward on two slices, and every tensor that is kept for the backward pass is
    counted.
    """
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
    """Bytes of memory of the device; of the machine's own memory this process's share."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / distributed.local_world_size()


def free(device: torch.device) -> float:
    """Bytes that nothing uses at present."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / distributed.local_world_size()
