"""The slice store: one file per cine and one per cine's labels below the cache folder, written once.

A file is one line of JSON, padded to 64 bytes, and then the plain array; a cine's motion map follows its
frames. Opening a store reads one line per subject, a slice is one read, a volume is one memory map. The
file's name has a hash of its sources: a changed source gets a new file, and readers of the old one go on.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cmrssp.data.cine import Cine, CineFacts, read_cine
from cmrssp.data.geometry import Geometry
from cmrssp.data.labels import LabelFacts, Labels, read_labels
from cmrssp.data.subject import LEFT_OUT, BrokenSubject, Problem, Subject
from cmrssp.files import atomic, check_writable, hashed, sweep
from cmrssp.hardware import distributed
from cmrssp.hardware.device import available_cores

_FORMAT = 11  # in the hash of the files' names


@dataclass(frozen=True, kw_only=True)
class CineRecord(CineFacts):
    """A stored cine."""

    path: Path
    offset: int
    shape: tuple[int, int, int, int]  # T, Z, H, W


@dataclass(frozen=True, kw_only=True)
class LabelRecord(LabelFacts):
    """The stored labels of a cine."""

    path: Path
    offset: int
    shape: tuple[int, int, int, int]  # F, Z, H, W


@dataclass(eq=False)
class Store:
    """Read access to the stored subjects. Holds one record per subject and no open file."""

    subjects: list[Subject]
    cines: list[CineRecord]
    labels: list[LabelRecord] | None
    left_out: list[Problem]

    def __post_init__(self) -> None:
        self.index = {subject.key: i for i, subject in enumerate(self.subjects)}

    def slice(self, subject: int, frame: int, slice: int) -> np.ndarray:
        """(H, W) int16 of the cine frame."""
        return _slice(self.cines[subject], "<i2", frame, slice)

    def volume(self, subject: int, frame: int) -> np.ndarray:
        """(Z, H, W) int16 of a cine frame, memory-mapped."""
        return _map(self.cines[subject], "<i2")[frame]

    def motion_slice(self, subject: int, slice: int) -> np.ndarray:
        """(H, W) float16 of the cine's motion map."""
        return _slice(self.cines[subject], "<f2", self.cines[subject].shape[0], slice)

    def label_slice(self, subject: int, frame: int, slice: int) -> np.ndarray:
        """(H, W) uint8 of a labelled cine frame. Raises ValueError for an unlabelled one."""
        record = self.labels[subject]
        return _slice(record, "u1", record.frames.index(frame), slice)

    def label_volume(self, subject: int, frame: int) -> np.ndarray:
        """(Z, H, W) uint8 of a labelled cine frame, memory-mapped."""
        record = self.labels[subject]
        return _map(record, "u1")[record.frames.index(frame)]

    def digests(self, keys: Iterable[str] | None = None, *, labels: bool = False) -> dict[str, str]:
        """{subject key: first 16 digits of the digest of its images or labels}, as checkpoints keep them."""
        records = self.labels if labels else self.cines
        return {key: records[self.index[key]].digest[:16] for key in (self.index if keys is None else keys)}


def _map(record: CineRecord | LabelRecord, dtype: str) -> np.ndarray:
    return np.memmap(record.path, dtype, "r", record.offset, record.shape)


def _slice(record: CineRecord | LabelRecord, dtype: str, volume: int, slice: int) -> np.ndarray:
    """One read, and no file stays open: 50,000 subjects exhaust neither file handles nor address space."""
    _, slices, height, width = record.shape
    size = height * width * np.dtype(dtype).itemsize
    start = record.offset + (volume * slices + slice) * size
    return np.fromfile(record.path, dtype, height * width, offset=start).reshape(height, width)


def build(
    subjects: Sequence[Subject], cache: Path, *, labels: bool, skip_broken: bool = False, quiet: bool = False
) -> Store:
    """Open the store of these subjects; first write, on all cores, what is missing or out of date in it.

    Without `labels` no label file is opened. Raises BrokenSubject that names all broken subjects; with
    `skip_broken` leaves them out, and prints them unless `quiet`. Raises UserError for a read-only cache.
    """
    folder = Path(cache) / "store"
    sweep(folder, older_than_s=86400)
    found: dict[str, tuple[CineRecord, LabelRecord | None]] = {}
    broken: dict[str, str] = {}

    def prepare(subject: Subject, write: bool) -> bool:
        """Whether the subject is stored, or broken."""
        try:
            cine, label = found[subject.key] = _records(folder, subject, labels, write)
        except BrokenSubject as error:
            broken[subject.key] = str(error)
            return True
        return bool(cine and (label or not labels))

    if missing := [subject for subject in subjects if not prepare(subject, write=False)]:
        check_writable("--cache", folder)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"storing {len(missing)} subjects in {folder}", flush=True)
        with ThreadPoolExecutor(available_cores()) as pool:
            done = pool.map(lambda subject: prepare(subject, write=True), missing)
            hide = distributed.hide_bar()
            list(tqdm(done, "building the store", len(missing), unit="subject", disable=hide))
    if broken:
        names = "".join(f"\n  {key}: {why}" for key, why in sorted(broken.items()))
        verdict = f"{len(broken)} of {len(subjects)} subjects cannot be used"
        if not skip_broken:
            raise BrokenSubject(f"{verdict}; repair, remove or leave them out with --skip-broken:{names}")
        if not quiet:
            print(f"{verdict}, left out:{names}")
    kept = [s for s in subjects if s.key not in broken]
    cines, label_records = ([found[s.key][i] for s in kept] for i in (0, 1))
    left_out = [Problem(key, "", why, LEFT_OUT) for key, why in broken.items()]
    return Store(kept, cines, label_records if labels else None, left_out)


def _records(
    folder: Path, subject: Subject, labels: bool, write: bool
) -> tuple[CineRecord | None, LabelRecord | None]:
    """The records of the stored cine and labels; what has no valid file is written, or is None."""
    path = _path(folder, subject, subject.files, [], ".cine")
    cine = _record(CineRecord, path, lambda: read_cine(subject), ["stored", "motion"], write)
    if not labels or not cine:
        return cine, None
    files = [*subject.files, *(p for f in subject.labels for p in (f.path, f.image) if p)]
    # The cine decides the labels' shape and axes, the layout their ids and frames.
    layout = [subject.label_ids, subject.ed, subject.es, [[f.frame, f.phase] for f in subject.labels]]
    path = _path(folder, subject, files, layout, ".labels")
    return cine, _record(
        LabelRecord, path, lambda: read_labels(subject, cine, _map(cine, "<i2")), ["masks"], write
    )


def _path(folder: Path, subject: Subject, files: Sequence[Path], layout: list, suffix: str) -> Path:
    """Where something is stored that is made from the files; sizes and times tell whether they changed."""
    try:
        stats = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
    except OSError as error:
        raise BrokenSubject(f"{error.filename}: {error.strerror}") from None
    made_from = json.dumps([_FORMAT, subject.key, str(subject.cine.resolve()), stats, layout])
    name = subject.file_name.encode()[:80].decode(errors="ignore")
    return folder / f"{name}-{hashed(made_from)}{suffix}"


def _record(
    kind: type, path: Path, read: Callable[[], Cine | Labels], arrays: Sequence[str], write: bool
) -> Any:
    """The record in the first line of a file. Without the file `write` what is read, or return None."""
    if not path.exists():
        if not write:
            return None
        content = read()
        header = {f.name: getattr(content, f.name) for f in fields(kind) if hasattr(content, f.name)}
        header["shape"] = getattr(content, arrays[0]).shape
        text = json.dumps(header, default=asdict).encode()
        with atomic(path) as file:
            file.write(text + b" " * (-(len(text) + 1) % 64) + b"\n")
            file.writelines(np.ascontiguousarray(getattr(content, name)).data for name in arrays)
    with open(path, "rb") as file:
        line = file.readline()
    header = json.loads(line, object_hook=_tuples)
    header["problems"] = tuple(Problem(**problem) for problem in header["problems"])
    if kind is CineRecord:
        header["geometry"] = Geometry(**header["geometry"])
    return kind(path=path, offset=len(line), **header)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
