"""Slices kept in the memory of the device that trains on them, so that no step waits for a file."""

from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from cmrssp.data.store import Store
from cmrssp.hardware import distributed


class DeviceCache:
    """All pixels of `batches.Slices`, in their order, native and unpadded; a batch is one gather."""

    def __init__(self, store: Store, slices, *, labelled: bool, motion: bool, device: torch.device) -> None:
        self.slices, self.pixels = slices, {}
        per_map, per_image = slices.areas * slices.depths, slices.areas * slices.counts

        def keep(kind: str, dtype: torch.dtype, sizes: np.ndarray, arrays: Iterator[np.ndarray]) -> None:
            self.pixels[kind] = torch.empty(sizes.sum(), dtype=dtype, device=device)
            end = 0
            for array in arrays:
                begin, end = end, end + array.size
                self.pixels[kind][begin:end] = torch.from_numpy(np.array(array).ravel())

        each = list(zip(slices.subjects, slices.frames, slices.depths, strict=True))
        frames = [(subject, frame) for subject, frames, _ in each for frame in frames]
        bar = tqdm(frames, "slices to the device", unit="frame", disable=distributed.hide_bar())
        keep("image", torch.int16, per_image, (store.volume(*place) for place in bar))
        if labelled:
            keep("label", torch.uint8, per_image, (store.label_volume(*place) for place in frames))
        if motion:  # one map per slice, whatever the number of frames
            maps = (store.motion_slice(subject, z) for subject, _, depth in each for z in range(depth))
            keep("motion", torch.float16, per_map, maps)
        self.begins = np.cumsum(per_image) - per_image  # of each subject's first pixel
        self.map_begins = np.cumsum(per_map) - per_map

    @staticmethod
    def needs(slices, *, labelled: bool, motion: bool) -> int:
        """The bytes that these slices take: int16 images, uint8 labels, float16 motion maps."""
        images, maps = (slices.areas @ slices.counts), (slices.areas @ slices.depths)
        return int(images * (2 + labelled) + maps * 2 * motion)

    def starts(self, numbers: np.ndarray) -> dict[str, torch.Tensor]:
        """start, map_start (B,) int64: where the pixels and the motion map of each slice begin."""
        i, within = self.slices.entry(numbers)
        area, z = self.slices.areas[i], within % self.slices.depths[i]
        starts = {"start": self.begins[i] + area * within, "map_start": self.map_begins[i] + area * z}
        return {name: torch.from_numpy(start) for name, start in starts.items()}

    def fill(self, batch: dict[str, torch.Tensor], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The batch with pixels, as `batches.collate` makes it, instead of `starts`."""
        rest = dict(batch)
        start, map_start = rest.pop("start"), rest.pop("map_start")
        height, width = batch["size"].T[..., None, None]
        rows = torch.arange(shape[0], device=height.device)[:, None]
        columns = torch.arange(shape[1], device=height.device)
        inside, offsets = (rows < height) & (columns < width), rows * width + columns
        places = dict.fromkeys(("image", "label"), torch.where(inside, start[:, None, None] + offsets, 0))
        if "motion" in self.pixels:
            places["motion"] = torch.where(inside, map_start[:, None, None] + offsets, 0)
        filled = {kind: (pixels[places[kind]] * inside)[:, None] for kind, pixels in self.pixels.items()}
        return {**filled, **rest}
