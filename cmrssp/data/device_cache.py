"""Slices kept in the memory of the device that trains on them, so that no step waits for a file."""

from collections.abc import Iterable

import numpy as np
import torch
from tqdm import tqdm

from cmrssp.data.store import Store
from cmrssp.hardware import distributed


class DeviceCache:
    """All pixels of `batches.Slices`, in their order, native and unpadded; a batch is one gather."""

    def __init__(self, store: Store, slices, *, labelled: bool, motion: bool, device: torch.device) -> None:
        areas, depths = _areas(store, slices), slices.depths
        counts = np.diff(slices.ends, prepend=0)  # slices of each subject
        per_slice = np.repeat(areas, counts)
        self.start = np.cumsum(per_slice) - per_slice  # of each slice among the pixels
        z = (np.arange(len(slices)) - np.repeat(slices.ends - counts, counts)) % np.repeat(depths, counts)
        maps = areas * depths  # one motion map per slice, whatever the number of frames
        self.map_start = np.repeat(np.cumsum(maps) - maps, counts) + per_slice * z
        subjects = list(zip(slices.subjects, slices.frames, depths, strict=True))
        places = [(subject, frame) for subject, frames, _ in subjects for frame in frames]
        bar = tqdm(places, "slices to the device", unit="frame", disable=distributed.hide_bar())
        pixels = per_slice.sum()
        self.image = torch.empty(pixels, dtype=torch.int16, device=device)
        self.label = torch.empty(pixels * labelled, dtype=torch.uint8, device=device)
        self.motion = torch.empty(maps.sum() * motion, dtype=torch.float16, device=device)
        _copy(self.image, (store.volume(*place) for place in bar))
        if labelled:
            _copy(self.label, (store.label_volume(*place) for place in places))
        if motion:
            _copy(self.motion, (store.motion_slice(s, z) for s, _, depth in subjects for z in range(depth)))

    @staticmethod
    def needs(store: Store, slices, *, labelled: bool, motion: bool) -> int:
        """The bytes that these slices take: int16 images, uint8 labels, float16 motion maps."""
        areas = _areas(store, slices)
        pixels = (areas * np.diff(slices.ends, prepend=0)).sum()
        return int(pixels * (2 + labelled) + (areas * slices.depths).sum() * 2 * motion)

    def starts(self, numbers: np.ndarray) -> dict[str, torch.Tensor]:
        """start, map_start (B,) int64: where the pixels and the motion map of each slice begin."""
        starts = {"start": self.start, "map_start": self.map_start}
        return {name: torch.from_numpy(start[numbers]) for name, start in starts.items()}

    def fill(self, batch: dict[str, torch.Tensor], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The batch with pixels, as `batches.collate` makes it, instead of `starts`."""
        size = batch["size"][..., None, None]
        rows = torch.arange(shape[0], device=size.device)[:, None]
        columns = torch.arange(shape[1], device=size.device)
        inside = (rows < size[:, 0]) & (columns < size[:, 1])
        batch = dict(batch)
        start, map_start = batch.pop("start"), batch.pop("map_start")
        sources = {
            "image": (self.image, start),
            "label": (self.label, start),
            "motion": (self.motion, map_start),
        }
        filled = {}
        for name, (pixels, begin) in sources.items():
            if len(pixels):
                places = torch.where(inside, begin[:, None, None] + rows * size[:, 1] + columns, 0)
                filled[name] = (pixels[places] * inside)[:, None]
        return {**filled, **batch}


def _areas(store: Store, slices) -> np.ndarray:
    """(subjects,) pixels per slice."""
    return np.array([np.prod(store.cines[i].shape[2:]) for i in slices.subjects], np.int64)


def _copy(to: torch.Tensor, arrays: Iterable[np.ndarray]) -> None:
    """The arrays one behind the other."""
    end = 0
    for array in arrays:
        begin, end = end, end + array.size
        to[begin:end] = torch.from_numpy(np.array(array).ravel())
