"""Slices kept in the memory of the device that trains on them, so that no step waits for a file."""

import numpy as np
import torch
from tqdm import tqdm

from cmrssp.data.store import Store
from cmrssp.hardware import distributed


class DeviceCache:
    """All pixels of some slices, one slice after the other, native and unpadded; a batch is one gather."""

    def __init__(self, store: Store, slices, *, labelled: bool, device: torch.device) -> None:
        """`slices`: of `batches.Slices`. Reads them all, once, in their order."""
        self.slices, self.areas = slices, _areas(store, slices)
        sizes = self.areas * np.diff(slices.ends, prepend=0)
        self.begins = np.cumsum(sizes) - sizes  # of each subject's first pixel
        self.image = torch.empty(sizes.sum(), dtype=torch.int16, device=device)
        self.label = torch.empty(sizes.sum() if labelled else 0, dtype=torch.uint8, device=device)
        end = 0
        for subject, frames in tqdm(
            list(zip(slices.subjects, slices.frames, strict=True)),
            "slices to the device",
            unit="subject",
            disable=distributed.hide_bar(),
        ):
            for frame in frames:
                volume = store.volume(subject, frame)
                begin, end = end, end + volume.size
                self.image[begin:end] = torch.from_numpy(np.array(volume).ravel())
                if labelled:
                    label = store.label_volume(subject, frame)
                    self.label[begin:end] = torch.from_numpy(np.array(label).ravel())

    @staticmethod
    def needs(store: Store, slices, *, labelled: bool) -> int:
        """The bytes that these slices take: int16 images, uint8 labels."""
        return int((_areas(store, slices) * np.diff(slices.ends, prepend=0)).sum()) * (3 if labelled else 2)

    def starts(self, numbers: np.ndarray) -> torch.Tensor:
        """(B,) int64: where the pixels of each of these slices begin."""
        entries = [self.slices.entry(number) for number in numbers]
        return torch.tensor([int(self.begins[i] + self.areas[i] * within) for i, within in entries])

    def fill(self, batch: dict[str, torch.Tensor], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """A batch with its images, and labels, as `batches.collate` makes them, in place of its `start`."""
        size, start = batch["size"][..., None, None], batch["start"][:, None, None]
        rows = torch.arange(shape[0], device=start.device)[:, None]
        columns = torch.arange(shape[1], device=start.device)
        inside = (rows < size[:, 0]) & (columns < size[:, 1])
        places = torch.where(inside, start + rows * size[:, 1] + columns, 0)
        filled = {"image": (self.image[places] * inside)[:, None]}
        if len(self.label):
            filled["label"] = (self.label[places] * inside)[:, None]
        return {**filled, **{key: value for key, value in batch.items() if key != "start"}}


def _areas(store: Store, slices) -> np.ndarray:
    """Pixels of a slice of each of the subjects."""
    return np.array([np.prod(store.cines[i].shape[2:]) for i in slices.subjects], np.int64)
