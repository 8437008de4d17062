"""From indices to batches: native slices of any size padded to one tensor, read ahead by one background
thread.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from cmrssp import distributed
from cmrssp.data.store import Store
from cmrssp.errors import UserError

Batch = dict[str, torch.Tensor]
_PAD_TO = 64  # so that shapes repeat


class Slices:
    """The slices that take part, numbered 0 .. len - 1; holds a few numbers a subject, whatever the number of
    slices.
    """

    def __init__(self, store: Store, keys: Sequence[str], *, phases: str | None = None) -> None:
        """All slices of all frames of the subjects `keys`; with `phases` (ed, es, both) of labelled frames
        only.
        """
        self.subjects = np.array([store.index[key] for key in keys], np.int64)
        frames = [
            store.labels[i].frames_of(phases) if phases else range(store.cines[i].shape[0])
            for i in self.subjects
        ]
        self.frames = frames
        self.depths = np.array([store.cines[i].shape[1] for i in self.subjects], np.int64)
        self.ends = np.cumsum([len(f) * d for f, d in zip(frames, self.depths, strict=True)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, number: int) -> tuple[int, int, int]:
        """(subject in the store, cine frame, slice) of a slice number."""
        i = int(np.searchsorted(self.ends, number, side="right"))
        start = int(self.ends[i - 1]) if i else 0
        frame, slice = divmod(int(number) - start, int(self.depths[i]))
        return int(self.subjects[i]), int(self.frames[i][frame]), slice


class Batches:
    """The batches of an epoch. Their order depends on (seed, epoch) alone; no slice is visited twice.

    Under torchrun `batch_size` is that of all ranks together: each reads its `share` of the same batches.
    """

    def __init__(
        self,
        store: Store,
        slices: Slices,
        *,
        batch_size: int,
        seed: int,
        labelled: bool,
        device: torch.device,
    ) -> None:
        if not len(slices):
            raise UserError(
                "there is no slice to train on: the training subjects have no "
                + ("labelled frame" if labelled else "slice")
            )
        self.store, self.slices, self.labelled, self.device = store, slices, labelled, device
        ranks = distributed.world_size()
        if batch_size % ranks:
            raise UserError(
                f"--batch-size {batch_size}: it is that of all {ranks} processes together, expected a "
                f"multiple of {ranks}, for example {-(-batch_size // ranks) * ranks}"
            )
        if len(slices) < ranks:
            raise UserError(f"{ranks} processes cannot share {len(slices)} slices; start fewer of them")
        self.batch_size, self.seed = min(batch_size, len(slices) // ranks * ranks), seed
        self.share = self.batch_size // ranks

    def __len__(self) -> int:
        return len(self.slices) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The shuffled batches of one epoch on the device, from number `first` on, of each this rank's share;
        the last incomplete batch is dropped.
        """
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.slices))
        return self._read(order[first * self.batch_size : len(self) * self.batch_size], shared=True)

    def in_order(self, limit: int | None = None, *, shared: bool = False) -> Iterator[Batch]:
        """All slices once, unshuffled, the last batch as large as it is; with `limit` that many, evenly
        spread. `shared`: as many as divide by the ranks, of each batch this rank's share.
        """
        count = min(limit or len(self.slices), len(self.slices))
        if shared:
            count -= count % distributed.world_size()
        return self._read(np.arange(count) * len(self.slices) // count, shared=shared)

    def _read(self, order: np.ndarray, *, shared: bool) -> Iterator[Batch]:
        parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if shared:
            parts = [np.split(part, distributed.world_size())[distributed.rank()] for part in parts]
        pin = self.device.type == "cuda"

        def read(part: np.ndarray) -> Batch:
            batch = collate(self.store, [self.slices.locate(n) for n in part], labelled=self.labelled)
            return {k: v.pin_memory() for k, v in batch.items()} if pin else batch

        for batch in _ahead(read, parts):
            yield to_device(batch, self.device)


def collate(store: Store, places: Sequence[tuple[int, int, int]], *, labelled: bool) -> Batch:
    """Slices (subject, frame, slice) as one batch before augmentation, on the CPU. B = len(places).

    image (B, 1, Hmax, Wmax) int16, zero-padded at the bottom and the right to multiples of 64; label (same)
    uint8 with `labelled`; size, spacing_mm, centre (B, 2) as (row, column); mean, std, max (B,) of the
    subject's whole cine; position (B,), k / n from the base, NaN for a single-slice stack; subject, frame
    (B,).
    """
    cines = [store.cines[subject] for subject, _, _ in places]
    height, width = (-(-max(c.shape[axis] for c in cines) // _PAD_TO) * _PAD_TO for axis in (2, 3))
    image = np.zeros((len(places), 1, height, width), np.int16)
    label = np.zeros(image.shape if labelled else 0, np.uint8)
    for i, (place, cine) in enumerate(zip(places, cines, strict=True)):
        image[i, 0, : cine.shape[2], : cine.shape[3]] = store.slice(*place)
        if labelled:
            label[i, 0, : cine.shape[2], : cine.shape[3]] = store.label_slice(*place)

    def column(values: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    batch = {
        "image": torch.from_numpy(image),
        "size": column([c.shape[2:] for c in cines], torch.int64),
        "spacing_mm": column([c.geometry.spacing_mm for c in cines]),
        "centre": column([c.centre for c in cines]),
        "mean": column([c.mean for c in cines]),
        "std": column([c.std for c in cines]),
        "max": column([c.max for c in cines]),
        "position": column(
            [
                z / c.shape[1] if c.shape[1] > 1 else float("nan")
                for (_, _, z), c in zip(places, cines, strict=True)
            ]
        ),
        "subject": column([subject for subject, _, _ in places], torch.int64),
        "frame": column([frame for _, frame, _ in places], torch.int64),
    }
    return {**batch, "label": torch.from_numpy(label)} if labelled else batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _ahead(
    read: Callable[[np.ndarray], Batch], parts: Sequence[np.ndarray], depth: int = 3
) -> Iterator[Batch]:
    """`read(part)` for each part in order, `depth` of them ahead, in one background thread."""
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def work() -> None:
        try:
            for part in parts:
                if stopped.is_set():
                    return
                ready.put(read(part))
            ready.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            ready.put(error)

    thread = threading.Thread(target=work, name="slice reader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        while thread.is_alive():  # it may wait for room to put one more batch
            with contextlib.suppress(queue.Empty):
                ready.get_nowait()
            thread.join(0.01)
