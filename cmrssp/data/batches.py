"""Batches: native slices padded to one tensor, read ahead or gathered from the device's memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from cmrssp.data.device_cache import DeviceCache
from cmrssp.data.store import Store
from cmrssp.errors import UserError
from cmrssp.hardware import distributed
from cmrssp.hardware.device import available_cores

# What a batch of B slices holds before augmentation (H, W: the largest slice, rounded up to multiples of 64):
#
#   image       (B, 1, H, W) int16  native slices, raw minus the cine's minimum; zeros at the bottom and right
#   label       (B, 1, H, W) uint8  in labelled batches: 0 background, 1 LV, 2 MYO, 3 RV
#   motion      (B, 1, H, W) float16 for methods that need it: the slice's motion map (`motion.py`)
#   size        (B, 2) int64        true rows and columns of each slice
#   spacing_mm  (B, 2) float32      between rows, between columns
#   centre      (B, 2) float32      (row, column) of the subject's crop centre in native pixels
#   mean, std   (B,) float32        of the subject's whole cine without borders of zeros
#   max         (B,) float32        of the subject's whole cine
#   position    (B,) float32        k / n of slice k of n from the base; NaN in a stack of one slice
#   subject     (B,) int64          number of the subject in the store
#   frame       (B,) int64          frame of the cine
#   weight      (B,) float32        with `predicted_weight` alone: factor of the slice's loss, on average 1
Batch = dict[str, torch.Tensor]
Frames = Mapping[str, Sequence[int]]  # {subject key: frames}
_PAD_TO = 64  # so that shapes repeat
_AHEAD = 3  # batches that are being read, or wait
_READERS = 4  # threads that feed a GPU; a CPU that trains has no core to spare for more than one


class Slices:
    """The slices to use, numbered from 0. Holds a few numbers per subject, none per slice."""

    def __init__(
        self, store: Store, keys: Sequence[str], *, phases: str | None = None, predicted: Frames | None = None
    ) -> None:
        """All slices of the subjects `keys`: of all frames, or of the labelled `phases` (ed, es, both). Then
        those with predicted labels: {subject key: frames}.
        """
        predicted = predicted or {}
        self.subjects = np.array([store.index[key] for key in (*keys, *predicted)], np.int64)
        shapes = np.array([store.cines[i].shape for i in self.subjects], np.int64).reshape(-1, 4)
        self.frames = [range(frames) for frames in shapes[:, 0]]
        if phases:
            self.frames = [store.labels[i].frames_of(phases) for i in self.subjects]
        self.frames[len(keys) :] = predicted.values()
        self.depths, self.areas = shapes[:, 1], shapes[:, 2] * shapes[:, 3]
        self.counts = np.array([len(f) for f in self.frames], np.int64) * self.depths  # slices of a subject
        self.ends = np.cumsum(self.counts)
        self.first_predicted = int(self.counts[: len(keys)].sum())

    def __len__(self) -> int:
        return int(self.counts.sum())

    def locate(self, number: int) -> tuple[int, int, int]:
        """(subject in the store, cine frame, slice) of a slice number."""
        i, within = map(int, self.entry(number))
        frame, slice = divmod(within, int(self.depths[i]))
        return int(self.subjects[i]), int(self.frames[i][frame]), slice

    def entry(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places in `subjects`, places among its slices) of slice numbers."""
        i = np.searchsorted(self.ends, numbers, side="right")
        return i, numbers - (self.ends - self.counts)[i]


class Batches:
    """The batches of an epoch; (seed, epoch) alone sets their order. `batch_size` is that of all ranks."""

    def __init__(
        self,
        store: Store,
        slices: Slices,
        *,
        batch_size: int,
        seed: int,
        labelled: bool,
        device: torch.device,
        motion: bool = False,
        predicted_weight: float = 1.0,
        predicted_share: float | None = None,
    ) -> None:
        """`predicted_weight`: of a slice with predicted labels, where one with true labels counts 1.
        `predicted_share`: what part of a batch they are; slices of one kind repeat, an epoch is as long as
        before.
        """
        ranks = distributed.world_size()
        if batch_size % ranks:
            example = f"expected a multiple of {ranks}, for example {-(-batch_size // ranks) * ranks}"
            raise UserError(f"--batch-size {batch_size}: is shared by {ranks} processes; {example}")
        if len(slices) < ranks:
            kind = "slices of labelled frames" if labelled else "slices"
            each = f" for each of {ranks} processes" if ranks > 1 else " to train on"
            raise UserError(f"expected {kind}{each}, got {len(slices)}")
        self.store, self.slices, self.device = store, slices, device
        self.labelled, self.motion = labelled, motion
        self.batch_size, self.seed = min(batch_size, len(slices) // ranks * ranks), seed
        self.per_rank = self.batch_size // ranks
        self.predicted_weight = predicted_weight
        self.num_predicted = round((predicted_share or 0) * self.batch_size)  # in each batch; 0: by chance
        if predicted_share is not None and not 0 < self.num_predicted < self.batch_size:
            got = f"{self.num_predicted} of the {self.batch_size} slices of a batch"
            raise UserError(
                f"--predicted-share {predicted_share:g}: expected a part of each batch, got {got}"
            )
        part = self.num_predicted / self.batch_size or 1 - slices.first_predicted / len(slices)
        self.mean_weight = 1 + part * (predicted_weight - 1)  # of an epoch's slices
        self.on_device: DeviceCache | None = None
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.slices) // self.batch_size

    def keep_on_device(self) -> None:
        """Copy all slices into the device's memory now; from here on none is read from a file."""
        kinds = {"labelled": self.labelled, "motion": self.motion}
        self.on_device = DeviceCache(self.store, self.slices, **kinds, device=self.device)

    def epochs(self, first: int, end: int, step: int = 0) -> Iterator[Batch]:
        """The shuffled batches of epochs `first` to `end` - 1, on the device, from batch `step` of `first`
        on.
        """

        def parts() -> Iterator[np.ndarray]:
            for epoch in range(first, end):
                yield from self._order(epoch)[step if epoch == first else 0 :]

        return self._read(parts(), split_over_ranks=True)

    def _order(self, epoch: int) -> np.ndarray:
        """The slice numbers of an epoch, (steps, batch size)."""
        draw, steps = np.random.default_rng((self.seed, epoch)), len(self)
        if not self.num_predicted:
            return draw.permutation(len(self.slices))[: steps * self.batch_size].reshape(steps, -1)
        true, predicted = np.split(np.arange(len(self.slices)), [self.slices.first_predicted])
        kinds = []
        for numbers, each in ((true, self.batch_size - self.num_predicted), (predicted, self.num_predicted)):
            passes = -(-steps * each // len(numbers))
            drawn = np.concatenate([draw.permutation(numbers) for _ in range(passes)])
            kinds.append(drawn[: steps * each].reshape(steps, each))
        return draw.permuted(np.concatenate(kinds, axis=1), axis=1)

    def in_order(self, limit: int | None = None, *, split_over_ranks: bool = False) -> Iterator[Batch]:
        """All slices once, unshuffled; the last batch may be small. `limit`: so many, always the same, drawn
        at random (a regular step could meet one slice of every stack). `split_over_ranks`: only this rank's
        share.
        """
        count = min(limit or len(self.slices), len(self.slices))
        if split_over_ranks:
            count -= count % distributed.world_size()
        order = np.sort(np.random.default_rng(0).choice(len(self.slices), count, replace=False))
        parts = (order[i : i + self.batch_size] for i in range(0, count, self.batch_size))
        return self._read(parts, split_over_ranks)

    def _read(self, parts: Iterable[np.ndarray], split_over_ranks: bool) -> Iterator[Batch]:
        ranks, rank = distributed.world_size(), distributed.rank()

        def read(part: np.ndarray) -> tuple[Batch, tuple[int, int], torch.cuda.Event | None]:
            mine = np.split(part, ranks)[rank] if split_over_ranks else part
            places = [self.slices.locate(n) for n in mine]
            if self.on_device:
                batch = {**describe(self.store, places), **self.on_device.starts(mine)}
            else:
                batch = collate(self.store, places, labelled=self.labelled, motion=self.motion)
            if self.predicted_weight != 1:
                weight = np.where(mine < self.slices.first_predicted, 1.0, self.predicted_weight)
                batch["weight"] = torch.from_numpy((weight / self.mean_weight).astype(np.float32))
            shape = padded(batch["size"].tolist())
            if self.copies is None:
                return batch, shape, None
            with torch.cuda.stream(self.copies):  # beside the step that is being computed
                batch = to_device({key: value.pin_memory() for key, value in batch.items()}, self.device)
                return batch, shape, self.copies.record_event()

        readers = max(1, min(_READERS, available_cores() // distributed.local_world_size() - 1))
        for batch, shape, copied in _ahead(read, parts, readers if self.copies else 1, self.device):
            if copied:
                now = torch.cuda.current_stream(self.device)
                now.wait_event(copied)
                for value in batch.values():
                    value.record_stream(now)
            yield self.on_device.fill(batch, shape) if self.on_device else batch


def padded(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(rows, columns) that hold images of all these sizes, rounded up so that shapes repeat."""
    return tuple(-(-max(size[axis] for size in sizes) // _PAD_TO) * _PAD_TO for axis in (0, 1))


def describe(store: Store, places: Sequence[tuple[int, int, int]]) -> Batch:
    """A batch of slices (subject, frame, slice) without pixels, on the CPU."""
    cines = [store.cines[subject] for subject, _, _ in places]
    subjects, frames, slices = torch.tensor(places).T
    depths = torch.tensor([cine.shape[1] for cine in cines])
    statistics = {
        name: torch.tensor([getattr(cine, name) for cine in cines])
        for name in ("centre", "mean", "std", "max")
    }
    return {
        "size": torch.tensor([cine.shape[2:] for cine in cines]),
        "spacing_mm": torch.tensor([cine.geometry.spacing_mm for cine in cines]),
        **statistics,
        "position": torch.where(depths > 1, slices / depths, torch.nan),
        "subject": subjects,
        "frame": frames,
    }


def collate(
    store: Store, places: Sequence[tuple[int, int, int]], *, labelled: bool, motion: bool = False
) -> Batch:
    """Slices (subject, frame, slice) as one batch before augmentation, on the CPU."""
    batch = describe(store, places)
    shape = (len(places), 1, *padded(batch["size"].tolist()))
    pixels = {"image": np.zeros(shape, np.int16)}
    pixels |= {"label": np.zeros(shape, np.uint8)} if labelled else {}
    pixels |= {"motion": np.zeros(shape, np.float16)} if motion else {}
    for i, (subject, frame, z) in enumerate(places):
        inside = (i, 0, *map(slice, store.cines[subject].shape[2:]))
        pixels["image"][inside] = store.slice(subject, frame, z)
        if labelled:
            pixels["label"][inside] = store.label_slice(subject, frame, z)
        if motion:
            pixels["motion"][inside] = store.motion_slice(subject, z)
    return {**{name: torch.from_numpy(array) for name, array in pixels.items()}, **batch}


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _ahead(
    read: Callable[[np.ndarray], tuple], parts: Iterable[np.ndarray], readers: int, device: torch.device
) -> Iterator[tuple]:
    """`read(part)` for each part in order, some of them ahead, in background threads."""
    stay = (torch.cuda.set_device, (device,)) if device.index is not None else ()  # else on the first GPU
    pool, pending = ThreadPoolExecutor(readers, "slice reader", *stay), deque()
    try:
        for part in parts:
            pending.append(pool.submit(read, part))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
