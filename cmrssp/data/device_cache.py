"""Slices kept in the memory of the device that trains on them, so that no step waits for a file."""

import numpy as np
import torch
from tqdm import tqdm

from cmrssp.data.store import Store
from cmrssp.hardware import distributed


class DeviceCache:
    """All pixels of `batches.Slices`, in their order, native and unpadded; a batch is one gather."""

    def __init__(
        self, store: Store, slices, *, labelled: bool, device: torch.device, motion: bool = False
    ) -> None:
        self.slices, self.areas = slices, _areas(store, slices)
        sizes = self.areas * np.diff(slices.ends, prepend=0)
        self.begins = np.cumsum(sizes) - sizes  # of each subject's first pixel
        self.image = torch.empty(sizes.sum(), dtype=torch.int16, device=device)
        self.label = torch.empty(sizes.sum() if labelled else 0, dtype=torch.uint8, device=device)
        maps = self.areas * slices.depths  # one map per slice, whatever the number of frames
        self.map_begins = np.cumsum(maps) - maps
        self.motion = torch.empty(maps.sum() if motion else 0, dtype=torch.float16, device=device)
        end = map_end = 0
        each = list(zip(slices.subjects, slices.frames, strict=True))
        for subject, frames in tqdm(
            each, "slices to the device", unit="subject", disable=distributed.hide_bar()
        ):
            for frame in frames:
                volume = store.volume(subject, frame)
                begin, end = end, end + volume.size
                self.image[begin:end] = torch.from_numpy(np.array(volume).ravel())
                if labelled:
                    volume = store.label_volume(subject, frame)
                    self.label[begin:end] = torch.from_numpy(np.array(volume).ravel())
            for z in range(store.cines[subject].shape[1] if motion else 0):
                map = store.motion_slice(subject, z)
                begin, map_end = map_end, map_end + map.size
                self.motion[begin:map_end] = torch.from_numpy(map.ravel().copy())

    @staticmethod
    def needs(store: Store, slices, *, labelled: bool, motion: bool = False) -> int:
        """The bytes that these slices take: int16 images, uint8 labels, float16 motion maps."""
        areas = _areas(store, slices)
        pixels = (areas * np.diff(slices.ends, prepend=0)).sum()
        return int(pixels * (3 if labelled else 2) + (areas * slices.depths).sum() * (2 if motion else 0))

    def starts(self, numbers: np.ndarray) -> dict[str, torch.Tensor]:
        """start, map_start (B,) int64: where the pixels and the motion map of each slice begin."""
        i, within = np.array([self.slices.entry(number) for number in numbers]).T
        maps = self.map_begins[i] + self.areas[i] * (within % self.slices.depths[i])
        starts = self.begins[i] + self.areas[i] * within
        return {"start": torch.from_numpy(starts), "map_start": torch.from_numpy(maps)}

    def fill(self, batch: dict[str, torch.Tensor], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The batch with pixels, as `batches.collate` makes it, instead of `starts`."""
        size = batch["size"][..., None, None]
        rows = torch.arange(shape[0], device=size.device)[:, None]
        columns = torch.arange(shape[1], device=size.device)
        inside = (rows < size[:, 0]) & (columns < size[:, 1])

        def gather(pixels: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            places = torch.where(inside, start[:, None, None] + rows * size[:, 1] + columns, 0)
            return (pixels[places] * inside)[:, None]

        rest = dict(batch)
        start, map_start = rest.pop("start"), rest.pop("map_start")
        label = {"label": gather(self.label, start)} if len(self.label) else {}
        motion = {"motion": gather(self.motion, map_start)} if len(self.motion) else {}
        return {"image": gather(self.image, start), **label, **motion, **rest}


def _areas(store: Store, slices) -> np.ndarray:
    """(subjects,) pixels per slice."""
    return np.array([np.prod(store.cines[i].shape[2:]) for i in slices.subjects], np.int64)
