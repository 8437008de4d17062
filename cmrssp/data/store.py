"""The slice store: one native-resolution file per cine, one per cine's labels, written once, below the cache
folder.

A file is one line of JSON (the record, padded to 64 bytes) and then the plain array, so that opening a store
reads one line per subject, a slice is one read, and a volume is one memory map. Its name has a hash of what
it was made from: of a changed source there is a new file, and who reads the old one is not disturbed.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cmrssp.data.cine import read_cine
from cmrssp.data.geometry import Geometry
from cmrssp.data.labels import Heart, read_labels
from cmrssp.data.subject import LEFT_OUT, BrokenSubject, Problem, Subject
from cmrssp.errors import UserError
from cmrssp.files import atomic, sweep
from cmrssp.hardware import distributed

FORMAT = 5
_OF_CINE = ("centre", "mean", "std", "max", "minimum", "scale", "time_step_s", "digest")


@dataclass(frozen=True)
class CineRecord:
    """What training and prediction need to know of a stored cine without reading it."""

    path: Path
    offset: int
    shape: tuple[int, int, int, int]  # T, Z, H, W
    geometry: Geometry
    centre: tuple[float, float]
    mean: float
    std: float
    max: float
    time_step_s: float | None
    digest: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class LabelRecord:
    path: Path
    offset: int
    shape: tuple[int, int, int, int]  # F, Z, H, W
    frames: tuple[int, ...]
    ed: int | None
    es: int | None
    heart: Heart | None
    digest: str
    problems: tuple[Problem, ...]

    @property
    def phases(self) -> dict[str, int]:
        """{"ED": cine frame, "ES": cine frame}, without the one that has no labels."""
        return {name: frame for name, frame in (("ED", self.ed), ("ES", self.es)) if frame is not None}

    def frames_of(self, phases: str) -> tuple[int, ...]:
        """The labelled frames that `ed`, `es` or `both` means; `both` is every one."""
        return self.frames if phases == "both" else tuple({self.ed if phases == "ed" else self.es} - {None})


class Store:
    """Read access to the stored subjects. Holds one record per subject and no open file."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        cines: Sequence[CineRecord],
        labels: Sequence[LabelRecord] | None,
        left_out: Sequence[Problem] = (),
    ) -> None:
        self.subjects, self.cines = list(subjects), list(cines)
        self.labels, self.left_out = None if labels is None else list(labels), list(left_out)
        self.index = {subject.key: i for i, subject in enumerate(self.subjects)}

    def slice(self, subject: int, frame: int, slice: int) -> np.ndarray:
        """(H, W) int16 of the cine frame."""
        return _read_slice(self.cines[subject], frame, slice, "<i2")

    def volume(self, subject: int, frame: int) -> np.ndarray:
        """(Z, H, W) int16 of a cine frame, memory-mapped."""
        return _map(self.cines[subject], "<i2")[frame]

    def label_slice(self, subject: int, frame: int, slice: int) -> np.ndarray:
        """(H, W) uint8 of a labelled cine frame. Raises ValueError for an unlabelled one."""
        record = self.labels[subject]
        return _read_slice(record, record.frames.index(frame), slice, "u1")

    def label_volume(self, subject: int, frame: int) -> np.ndarray:
        """(Z, H, W) uint8 of a labelled cine frame, memory-mapped."""
        record = self.labels[subject]
        return _map(record, "u1")[record.frames.index(frame)]


def build(
    subjects: Sequence[Subject],
    cache: Path,
    *,
    labels: bool,
    skip_broken: bool = False,
    name_broken: bool = True,
    progress: bool = True,
) -> Store:
    """Open the store of these subjects; what is missing or out of date in it is built first, on all cores.

    With `labels` False no label file is opened. Raises BrokenSubject with every broken subject in it, unless
    `skip_broken`: then they are left out, and printed if `name_broken`.
    """
    folder = Path(cache) / "store"
    folder.mkdir(parents=True, exist_ok=True)
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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(
            tqdm(
                pool.map(lambda subject: prepare(subject, write=True), missing),
                "building the store",
                len(missing),
                unit="subject",
                disable=distributed.hide_bar() if progress and missing else True,
            )
        )
    if broken:
        names = "".join(f"\n  {key}: {why}" for key, why in sorted(broken.items()))
        verdict = f"{len(broken)} of {len(subjects)} subjects cannot be used"
        if not skip_broken:
            raise BrokenSubject(
                f"{verdict}; mend or remove them, or leave them out with --skip-broken:{names}"
            )
        if name_broken:
            print(f"{verdict}, left out:{names}")
    kept = [s for s in subjects if s.key not in broken]
    return Store(
        kept,
        [cines[s.key] for s in kept],
        [label_records[s.key] for s in kept] if labels else None,
        [Problem(key, "", why, LEFT_OUT) for key, why in sorted(broken.items())],
    )


def _cine(folder: Path, subject: Subject, write: bool) -> CineRecord | None:
    """The record of the stored cine; where there is no valid file, write it or give None."""
    path = _path(folder, subject, _fingerprint([subject.cine]), ".cine")
    header = _valid_header(path)
    if header is None and not write:
        return None
    if header is None:
        cine = read_cine(subject)
        header = _write(
            path,
            cine.stored,
            {
                **{name: getattr(cine, name) for name in _OF_CINE},
                "geometry": asdict(cine.geometry),
                "problems": _plain(cine.problems),
            },
        )
    geometry = Geometry(**{k: tuple(v) if isinstance(v, list) else v for k, v in header["geometry"].items()})
    return CineRecord(
        path,
        header["offset"],
        tuple(header["shape"]),
        geometry,
        tuple(header["centre"]),
        *(header[name] for name in ("mean", "std", "max", "time_step_s", "digest")),
        _problems(subject, header),
    )


def _labels(folder: Path, subject: Subject, cine: CineRecord, write: bool) -> LabelRecord | None:
    files = [subject.cine, *(p for f in subject.labels for p in (f.path, f.image) if p)]
    # the cine binds the labels' shape and axes, the layout their ids and frames
    said = [subject.label_ids, subject.ed, subject.es, [[f.frame, f.phase] for f in subject.labels]]
    sources = [*_fingerprint(files), json.loads(json.dumps(said))]
    path = _path(folder, subject, sources, ".labels")
    header = _valid_header(path)
    if header is None and not write:
        return None
    if header is None:
        labels = read_labels(subject, _map(cine, "<i2"), cine.geometry)
        known = json.dumps([labels.frames, labels.ed, labels.es]).encode()
        header = _write(
            path,
            labels.masks,
            {
                "digest": sha256(known + labels.masks.tobytes()).hexdigest(),
                "frames": labels.frames,
                "ed": labels.ed,
                "es": labels.es,
                "heart": asdict(labels.heart) if labels.heart else None,
                "problems": _plain(labels.problems),
            },
        )
    heart = header["heart"]
    return LabelRecord(
        path,
        header["offset"],
        tuple(header["shape"]),
        tuple(header["frames"]),
        header["ed"],
        header["es"],
        Heart(tuple(heart["centre"]), tuple(heart["box"])) if heart else None,
        header["digest"],
        _problems(subject, header),
    )


def _plain(problems: Sequence[Problem]) -> list[list[str]]:
    return [[problem.file, problem.what, problem.done] for problem in problems]


def _problems(subject: Subject, header: dict) -> tuple[Problem, ...]:
    return tuple(Problem(subject.key, *entry) for entry in header["problems"])


def _path(folder: Path, subject: Subject, sources: list, suffix: str) -> Path:
    made_from = json.dumps([FORMAT, str(subject.cine.resolve()), sources])
    name = subject.file_name.encode()[:80].decode(errors="ignore")
    return folder / f"{name}-{sha256(made_from.encode()).hexdigest()[:16]}{suffix}"


def _fingerprint(paths: Sequence[Path]) -> list[list]:
    """Name, size and time of change of each file: what tells that a source has changed. Opens nothing."""
    try:
        return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths]
    except OSError as error:
        raise BrokenSubject(f"{error.filename}: {error.strerror}") from None


def _write(path: Path, array: np.ndarray, header: dict) -> dict:
    record = json.dumps({"shape": array.shape, "bytes": array.nbytes, **header})
    line = record.encode() + b" " * (-(len(record.encode()) + 1) % 64) + b"\n"
    with atomic(path) as file:
        file.write(line)
        file.write(np.ascontiguousarray(array).data)
    return {**json.loads(record), "offset": len(line)}


def _valid_header(path: Path) -> dict | None:
    """The record of a complete file; None where there is none."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
            header = json.loads(line)
            whole = os.fstat(file.fileno()).st_size == len(line) + header["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {**header, "offset": len(line)} if whole else None


def _map(record: CineRecord | LabelRecord, dtype: str) -> np.ndarray:
    try:
        return np.memmap(record.path, dtype, "r", record.offset, record.shape)
    except ValueError:
        raise _shorter(record) from None


def _shorter(record: CineRecord | LabelRecord) -> UserError:
    return UserError(f"{record.path}: shorter than it was; start again, and it is written again")


def _read_slice(record: CineRecord | LabelRecord, volume: int, slice: int, dtype: str) -> np.ndarray:
    """One read, and no file stays open: 50,000 subjects exhaust neither file handles nor address space."""
    _, slices, height, width = record.shape
    size = height * width * np.dtype(dtype).itemsize
    file = os.open(record.path, os.O_RDONLY)
    try:
        read = os.pread(file, size, record.offset + (volume * slices + slice) * size)
    finally:
        os.close(file)
    if len(read) < size:
        raise _shorter(record)
    return np.frombuffer(read, dtype).reshape(height, width)
