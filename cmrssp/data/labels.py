"""The labels of one subject: read, brought to the frames of its cine, and checked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from cmrssp.data.geometry import Geometry
from cmrssp.data.nifti import load, voxels
from cmrssp.data.subject import CLASSES, CORRECTED, LEFT_OUT, USED, BrokenSubject, LabelFile, Problem, Subject

_SAME, _ALIKE = 0.9999, 0.9  # correlation of a labelled image with a frame of its cine
_STRIDE = 3  # of the pixels that are compared


@dataclass(frozen=True)
class Heart:
    """Where the labels of a subject lie, over all its labelled frames and slices; in native pixels."""

    centre: tuple[float, float]  # centroid, (row, column)
    box: tuple[int, int, int, int]  # first and last row, first and last column


@dataclass(frozen=True)
class Labels:
    """The labelled frames of one subject: (F, Z, H, W) uint8 with ids 0..3, and the cine frame of each."""

    masks: np.ndarray
    frames: tuple[int, ...]
    ed: int | None  # cine frames of end diastole and end systole, None where unlabelled
    es: int | None
    heart: Heart | None
    problems: tuple[Problem, ...] = ()


@np.errstate(all="ignore")
def read_labels(subject: Subject, cine: np.ndarray, geometry: Geometry) -> Labels:
    """Read the label files of a subject with the stored cine (T, Z, H, W). Raises BrokenSubject.

    A frame counts as labelled when anything in it is. ED is the labelled frame with the larger LV blood pool,
    ES the one with the smaller; what the data set says otherwise is reported, not believed.
    """
    reference = load(subject.cine)
    masks: dict[int, np.ndarray] = {}
    named: dict[str, int] = {}  # phase: frame, according to the files' names
    problems: list[Problem] = []
    for file in subject.labels:

        def note(what: str, done: str = USED, file: LabelFile = file) -> None:
            problems.append(Problem(subject.key, file.path.name, what, done))

        def read(path: Path, note=note) -> np.ndarray:
            return _on_grid(path, reference, geometry, note)

        array = _label_ids(subject, file.path, cine.shape, read(file.path))
        if not array.any():
            note("holds no label")
            continue
        for frame, mask in _place(subject, file, array, cine, read, note):
            if not mask.any():
                continue
            if frame in masks:
                note(f"belongs to frame {frame}, for which there are labels already: not used", LEFT_OUT)
                continue
            masks[frame] = mask
            named.update({file.phase: frame} if file.phase else {})
    complete = [frame for frame, mask in masks.items() if (mask == 1).any() and (mask == 2).any()]
    if len(complete) > 1:  # then a frame with a few stray voxels is no end systole
        for frame in sorted(masks.keys() - set(complete)):
            what = f"frame {frame} lacks LV or MYO, others have both: not used"
            problems.append(Problem(subject.key, subject.labels[0].path.name, what, LEFT_OUT))
            del masks[frame]
    frames = tuple(sorted(masks))
    stacked = np.stack([masks[f] for f in frames]) if frames else np.zeros((0, *cine.shape[1:]), np.uint8)
    table = {"ED": subject.ed, "ES": subject.es} | named
    ed, es, odd = _phases(table, stacked, frames)
    odd += _gaps(stacked, frames, {"ED": ed, "ES": es}) + _order(stacked) + _numbering(stacked)
    problems += [Problem(subject.key, subject.labels[0].path.name, what, done) for what, done in odd]
    return Labels(stacked, frames, ed, es, _heart(stacked), tuple(problems))


def _on_grid(path: Path, reference: nibabel.Nifti1Image, geometry: Geometry, note) -> np.ndarray:
    """The voxels of a file in the canonical axes of its cine, whose file is `reference`: (frames, Z, H, W).

    The order of the array decides, unless the two affines say that the file holds the very grid of the cine
    with axes swapped or reversed.
    """
    image = load(path)
    array = voxels(path, image, scaled=True)
    box = np.array(reference.shape[:3])
    if not np.allclose(image.affine, reference.affine, atol=1e-3):
        try:
            step = np.linalg.solve(reference.affine, image.affine)  # voxel of the file -> voxel of the cine
        except np.linalg.LinAlgError:
            step = np.full((4, 4), np.nan)
        turn = np.rint(np.nan_to_num(step[:3, :3])).astype(int)
        corner = np.where(turn.sum(axis=1) < 0, box - 1, 0)
        if (np.abs(turn).sum(axis=0) == 1).all() and (np.abs(turn).sum(axis=1) == 1).all():
            alike = np.allclose(step[:3, :3], turn, atol=0.02)
            fits = alike and np.allclose(step[:3, 3], corner, atol=0.5)
            if alike and not fits:
                first = ", ".join(f"{v:.1f}" for v in step[:3, 3])
                note(f"by its affine {path.name} is not on the grid of its cine (its first voxel is at "
                     f"{first} there): the order of the array was believed")  # fmt: skip
            if fits and (turn != np.eye(3, dtype=int)).any():
                order = np.abs(turn).argmax(axis=1)
                array = np.flip(array.transpose(*order, 3), np.flatnonzero(turn.sum(axis=1) < 0).tolist())
                note(f"{path.name} is stored in other axes than its cine: turned by its affine", CORRECTED)
    return geometry.to_canonical(array)


def _label_ids(subject: Subject, path: Path, shape: Sequence[int], array: np.ndarray) -> np.ndarray:
    """Voxels (frames, Z, H, W) of a label file as uint8 with our ids."""
    if array.dtype.kind == "f" and np.isfinite(array).all() and np.abs(array - np.rint(array)).max() < 1e-3:
        array = np.rint(array)
    if array.shape[1:] != tuple(shape[1:]) or len(array) not in (1, shape[0]):
        raise BrokenSubject(
            f"{path}: expected the cine's shape (frames, slices, rows, columns) = {tuple(shape)}, got "
            f"{array.shape}"
        )
    known = np.arange(len(subject.label_ids))
    if array.dtype.kind == "f" or array.min() < 0 or array.max() >= len(known):
        ids = np.unique(array)
        if not np.isin(ids, known).all():
            raise BrokenSubject(
                f"{path}: expected label ids 0 to {len(known) - 1}, got "
                f"{', '.join(f'{i:.9g}' for i in ids[:8])}" + ("" if len(ids) <= 8 else ", ...")
            )
    array = array.astype(np.uint8, copy=False)
    same = subject.label_ids == tuple(known)
    return array if same else np.take(np.array(subject.label_ids, np.uint8), array)


def _place(
    subject: Subject, file: LabelFile, array: np.ndarray, cine: np.ndarray, read, note
) -> Iterator[tuple[int, np.ndarray]]:
    """(cine frame, mask (Z, H, W)) of each volume of a label file."""
    if file.frame is None and file.image is None and len(array) == len(cine):
        yield from enumerate(array)
        return
    frame, only = file.frame, [f for f in (subject.ed, subject.es) if f is not None]
    if file.image is not None:
        frame = _matching(file.image, cine, read, note)
        if frame is None:
            return
    elif frame is None and len(only) == 1:
        frame = only[0]
    if frame is None:
        raise BrokenSubject(
            f"{file.path}: expected labels of all {len(cine)} frames, got a 3D file; give a 4D file (zeros "
            "where there are no labels), or say which frame it is: the ED or the ES of the data set's table"
        )
    if not 0 <= frame < len(cine) or len(array) != 1:
        raise BrokenSubject(
            f"{file.path}: expected one of the cine's {len(cine)} frames, got frame {frame} (counted from 0) "
            f"with {len(array)} volumes"
        )
    yield frame, array[0]


def _matching(path: Path, cine: np.ndarray, read, note) -> int | None:
    """The cine frame that shows the same as the labelled image: the one that correlates best with it, where
    one does at all; None, and a problem, where none does.
    """
    image = read(path)
    if image.shape[1:] != cine.shape[1:] or len(image) != 1:
        note(
            f"{path.name} has shape {image.shape}, the cine {cine.shape}: frame not known, not used", LEFT_OUT
        )
        return None

    def standard(volume: np.ndarray) -> np.ndarray:
        values = volume[:, ::_STRIDE, ::_STRIDE].astype(np.float64).ravel()
        values -= values.mean()
        return values / max(float(np.linalg.norm(values)), 1e-9)

    wanted = standard(image[0])
    alike = np.nan_to_num([float(standard(frame) @ wanted) for frame in cine])
    frame = int(alike.argmax())
    if alike[frame] < _ALIKE:
        best = f"best correlation {alike[frame]:.2f}"
        note(f"no frame of the cine looks like {path.name} ({best}): not used", LEFT_OUT)
        return None
    if alike[frame] < _SAME:
        note(f"{path.name} is not in the cine; frame {frame} is the most alike "
             f"(correlation {alike[frame]:.4f})", CORRECTED)  # fmt: skip
    return frame


def _phases(
    table: dict[str, int | None], masks: np.ndarray, frames: tuple[int, ...]
) -> tuple[int | None, int | None, list[tuple[str, str]]]:
    """(ED frame, ES frame, problems) from the LV blood pools of the labelled frames."""
    said = (table["ED"], table["ES"])
    if not frames:
        return None, None, []
    if len(frames) == 1:  # nothing to compare with: the table decides, ED where it says nothing
        far = [np.inf if t is None else abs(frames[0] - t) for t in said]
        late = far[1] < far[0]
        what = (
            f"the labelled frame is {frames[0]}, the data set says ED {said[0]} and ES {said[1]} (counted "
            f"from 0): taken as {'ES' if late else 'ED'}"
        )
        odd = [] if said[late] in (None, frames[0]) else [(what, CORRECTED)]
        return (None, frames[0], odd) if late else (frames[0], None, odd)
    pools = (masks == 1).sum(axis=(1, 2, 3))
    if pools.min() == pools.max():  # nothing to tell them apart by
        told = set(said) <= set(frames) and said[0] != said[1]
        return (*said, []) if told else (frames[0], frames[-1], [])
    found = (frames[int(pools.argmax())], frames[int(pools.argmin())])
    wrong = [
        (
            f"{phase} is frame {f} by the labels' blood pool, the data set says {t} (both counted from 0)",
            CORRECTED,
        )
        for phase, f, t in zip(("ED", "ES"), found, said, strict=True)
        if t is not None and f != t
    ]
    return *found, wrong


def _gaps(masks: np.ndarray, frames: tuple[int, ...], phases: dict[str, int | None]) -> list[tuple[str, str]]:
    """What is missing where there are labels at all."""
    gaps = [f"{phase} has no labels" for phase, frame in phases.items() if frame is None] if frames else []
    for phase, frame in phases.items():
        if frame is not None:
            mask = masks[frames.index(frame)]
            gaps += [f"{phase} has no {name}" for id, name in enumerate(CLASSES, 1) if not (mask == id).any()]
    return [(gap, USED) for gap in gaps]


def _order(masks: np.ndarray) -> list[tuple[str, str]]:
    """A problem where the LV is wider in the last third of the slices than in the first: base comes first."""
    areas = (masks == 1).sum(axis=(0, 2, 3))
    third = len(areas) // 3
    if third and areas[:third].mean() < areas[-third:].mean():
        return [("the slice order is contradicted by the labels: the LV is wider in the last third of the "
                 "stack than in the first", USED)]  # fmt: skip
    return []


def _numbering(masks: np.ndarray) -> list[tuple[str, str]]:
    """A problem where more of the RV's border than of the LV's is shared with the myocardium."""
    lv, rv = (beside / max(border, 1) for beside, border in (borders(masks, id) for id in (1, 3)))
    if rv <= lv:
        return []
    return [(f"the myocardium lies around label 3 ({rv:.0%} of its border) rather than around label 1 "
             f"({lv:.0%}): are LV and RV exchanged, as in ACDC's numbering?", USED)]  # fmt: skip


def borders(masks: np.ndarray, id: int) -> tuple[int, int]:
    """In masks (T, Z, H, W), over all in-plane neighbours of a class's pixels that are of another class:
    (those that are myocardium, all).
    """
    beside = border = 0
    for axis in (2, 3):
        low, high = np.moveaxis(masks, axis, 0)[:-1], np.moveaxis(masks, axis, 0)[1:]
        for inner, outer in ((low, high), (high, low)):
            neighbours = outer[(inner == id) & (outer != id)]
            beside += int(np.count_nonzero(neighbours == 2))
            border += neighbours.size
    return beside, border


def _heart(masks: np.ndarray) -> Heart | None:
    counts = (masks > 0).sum(axis=(0, 1))
    if not counts.any():
        return None
    lines = [counts.sum(axis=1), counts.sum(axis=0)]  # over rows, over columns
    centre = tuple(float(line @ np.arange(len(line)) / line.sum()) for line in lines)
    return Heart(centre, tuple(int(i) for line in lines for i in np.flatnonzero(line)[[0, -1]]))
