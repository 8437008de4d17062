"""The slice store: one file per cine and one per cine's labels below the cache folder, written once.

A file is one line of JSON, padded to 64 bytes, and then the plain array; a cine's motion map follows its
frames. Opening a store reads one line per subject, a slice is one read, a volume is one memory map. The
file's name has a hash of its sources: a changed source gets a new file, and readers of the old one go on.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cmrssp.data.cine import CineFacts, read_cine
from cmrssp.data.geometry import Geometry
from cmrssp.data.labels import Heart, LabelFacts, read_labels
from cmrssp.data.subject import LEFT_OUT, BrokenSubject, Problem, Subject
from cmrssp.errors import UserError
from cmrssp.files import atomic, sweep
from cmrssp.hardware import distributed
from cmrssp.hardware.device import available_cores

FORMAT = 8
Content = tuple[list[np.ndarray], dict[str, Any]]  # arrays, one behind the other; facts


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
    digest: str  # of frames and masks


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
        return _read_slice(self.cines[subject], frame, slice, "<i2")

    def volume(self, subject: int, frame: int) -> np.ndarray:
        """(Z, H, W) int16 of a cine frame, memory-mapped."""
        return _map(self.cines[subject], "<i2")[frame]

    def motion_slice(self, subject: int, slice: int) -> np.ndarray:
        """(H, W) float16 of the cine's motion map."""
        return _read_slice(self.cines[subject], self.cines[subject].shape[0], slice, "<f2")

    def label_slice(self, subject: int, frame: int, slice: int) -> np.ndarray:
        """(H, W) uint8 of a labelled cine frame. Raises ValueError for an unlabelled one."""
        record = self.labels[subject]
        return _read_slice(record, record.frames.index(frame), slice, "u1")

    def label_volume(self, subject: int, frame: int) -> np.ndarray:
        """(Z, H, W) uint8 of a labelled cine frame, memory-mapped."""
        record = self.labels[subject]
        return _map(record, "u1")[record.frames.index(frame)]

    def digests(self, keys: Iterable[str] | None = None, *, labels: bool = False) -> dict[str, str]:
        """{subject key: first 16 digits of the digest of its images or labels}, as checkpoints keep them."""
        records = self.labels if labels else self.cines
        return {key: records[self.index[key]].digest[:16] for key in (self.index if keys is None else keys)}


def build(
    subjects: Sequence[Subject],
    cache: Path,
    *,
    labels: bool,
    skip_broken: bool = False,
    name_broken: bool = True,
    progress: bool = True,
) -> Store:
    """Open the store of these subjects; first write, on all cores, what is missing or out of date in it.

    Without `labels` no label file is opened. Raises BrokenSubject that names all broken subjects; with
    `skip_broken` leaves them out, and prints them if `name_broken`. Raises UserError for a read-only cache.
    """
    folder = Path(cache) / "store"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_cache(folder, error) from None
    sweep(folder, older_than_s=86400)
    cines, label_records, broken = {}, {}, {}

    def prepare(subject: Subject, write: bool) -> bool:
        try:
            cine = _cine(folder, subject, write)
            label = _labels(folder, subject, cine, write) if labels and cine else None
        except BrokenSubject as error:
            broken[subject.key] = str(error)
            return True
        cines[subject.key], label_records[subject.key] = cine, label
        return bool(cine and (label or not labels))

    missing = [subject for subject in subjects if not prepare(subject, write=False)]
    if missing and progress:
        print(f"storing {len(missing)} subjects in {folder}", flush=True)
    hidden = not (missing and progress) or distributed.hide_bar()
    with ThreadPoolExecutor(available_cores()) as pool:
        done = pool.map(lambda subject: prepare(subject, write=True), missing)
        list(tqdm(done, "building the store", len(missing), unit="subject", disable=hidden))
    if broken:
        names = "".join(f"\n  {key}: {why}" for key, why in sorted(broken.items()))
        verdict = f"{len(broken)} of {len(subjects)} subjects cannot be used"
        if not skip_broken:
            raise BrokenSubject(f"{verdict}; repair, remove or leave them out with --skip-broken:{names}")
        if name_broken:
            print(f"{verdict}, left out:{names}")
    kept = [s for s in subjects if s.key not in broken]
    records = [label_records[s.key] for s in kept] if labels else None
    left_out = [Problem(key, "", why, LEFT_OUT) for key, why in sorted(broken.items())]
    return Store(kept, [cines[s.key] for s in kept], records, left_out)


def _no_cache(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: {error.strerror}; give a writable folder as --cache")


def _cine(folder: Path, subject: Subject, write: bool) -> CineRecord | None:
    """The record of the stored cine; without a valid file write it, or return None."""
    path = _path(folder, subject, _fingerprint(subject.files), ".cine")

    def read() -> Content:
        cine = read_cine(subject)
        return [cine.stored, cine.motion], _values(CineFacts, cine)

    if (header := _stored_header(path, read if write else None)) is None:
        return None
    geometry = Geometry(**_tuples(header.pop("geometry")))
    return CineRecord(path=path, geometry=geometry, **_facts(subject, header))


def _labels(folder: Path, subject: Subject, cine: CineRecord, write: bool) -> LabelRecord | None:
    files = [*subject.files, *(p for f in subject.labels for p in (f.path, f.image) if p)]
    # The cine decides the labels' shape and axes, the layout their ids and frames.
    layout = [subject.label_ids, subject.ed, subject.es, [[f.frame, f.phase] for f in subject.labels]]
    path = _path(folder, subject, [*_fingerprint(files), layout], ".labels")

    def read() -> Content:
        labels = read_labels(subject, _map(cine, "<i2"), cine.geometry)
        known = json.dumps([labels.frames, labels.ed, labels.es]).encode()
        digest = sha256(known + labels.masks.tobytes()).hexdigest()
        return [labels.masks], {**_values(LabelFacts, labels), "digest": digest}

    if (header := _stored_header(path, read if write else None)) is None:
        return None
    heart = header.pop("heart")
    return LabelRecord(path=path, heart=Heart(**_tuples(heart)) if heart else None, **_facts(subject, header))


def _values(kind: type, facts: CineFacts | LabelFacts) -> dict[str, Any]:
    return {field.name: getattr(facts, field.name) for field in fields(kind)}


def _facts(subject: Subject, header: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record from the JSON of its file."""
    problems = tuple(Problem(**{**problem, "subject": subject.key}) for problem in header.pop("problems"))
    return {**_tuples(header), "problems": problems}


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _path(folder: Path, subject: Subject, sources: list, suffix: str) -> Path:
    made_from = json.dumps([FORMAT, str(subject.cine.resolve()), sources])
    name = subject.file_name.encode()[:80].decode(errors="ignore")
    return folder / f"{name}-{sha256(made_from.encode()).hexdigest()[:16]}{suffix}"


def _fingerprint(paths: Sequence[Path]) -> list[list]:
    """Name, size and time of change of each file: they tell whether a source has changed."""
    try:
        return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths]
    except OSError as error:
        raise BrokenSubject(f"{error.filename}: {error.strerror}") from None


def _stored_header(path: Path, read: Callable[[], Content] | None) -> dict[str, Any] | None:
    """The JSON of a complete file and its offset. Else write what `read` gives; None without `read`."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
            header = json.loads(line)
            if os.fstat(file.fileno()).st_size == len(line) + header.pop("bytes"):
                return {**header, "offset": len(line)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    if read is None:
        return None
    arrays, facts = read()
    header = {"bytes": sum(a.nbytes for a in arrays), "shape": arrays[0].shape, **facts}
    text = json.dumps(header, default=asdict).encode()
    line = text + b" " * (-(len(text) + 1) % 64) + b"\n"
    try:
        with atomic(path) as file:
            file.write(line)
            for array in arrays:
                file.write(np.ascontiguousarray(array).data)
    except PermissionError as error:
        raise _no_cache(path.parent, error) from None
    header = json.loads(text)
    del header["bytes"]
    return {**header, "offset": len(line)}


def _map(record: CineRecord | LabelRecord, dtype: str) -> np.ndarray:
    try:
        return np.memmap(record.path, dtype, "r", record.offset, record.shape)
    except ValueError:
        raise _shorter(record) from None


def _shorter(record: CineRecord | LabelRecord) -> UserError:
    return UserError(f"{record.path}: shorter than it was; start again to rewrite it")


def _read_slice(record: CineRecord | LabelRecord, volume: int, slice: int, dtype: str) -> np.ndarray:
    """One read, and no file stays open: 50,000 subjects exhaust neither file handles nor address space."""
    _, slices, height, width = record.shape
    size = height * width * np.dtype(dtype).itemsize
    with open(record.path, "rb", buffering=0) as file:
        read = os.pread(file.fileno(), size, record.offset + (volume * slices + slice) * size)
    if len(read) < size:
        raise _shorter(record)
    return np.frombuffer(read, dtype).reshape(height, width)
