"""The labels of one subject: read, brought to the frames of its cine, and checked."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from skimage.measure import regionprops

from cmrssp.data.geometry import Geometry
from cmrssp.data.nifti import cine_image, grid, load, voxels
from cmrssp.data.subject import CLASSES, CORRECTED, LEFT_OUT, USED, BrokenSubject, LabelFile, Problem, Subject

_SAME, _ALIKE = 0.9999, 0.9  # correlation of a labelled image with a frame of its cine
_STRIDE = 3  # of the pixels that are compared
Note = Callable[..., None]  # (what, what was done): a problem of the file that is being read


@dataclass(frozen=True)
class Heart:
    """Where the labels of a subject lie, over all its labelled frames and slices; in native pixels."""

    centre: tuple[float, float]  # centroid, (row, column)
    box: tuple[int, int, int, int]  # first and last row, first and last column


@dataclass(frozen=True)
class LabelFacts:
    """What is known of a subject's labels without the masks."""

    frames: tuple[int, ...]  # the cine frames with labels
    ed: int | None  # cine frames of end diastole and end systole, None where unlabelled
    es: int | None
    heart: Heart | None
    problems: tuple[Problem, ...]

    @property
    def phases(self) -> dict[str, int]:
        """{"ED": cine frame, "ES": cine frame}, the labelled ones."""
        return {name: frame for name, frame in (("ED", self.ed), ("ES", self.es)) if frame is not None}

    def frames_of(self, phases: str) -> tuple[int, ...]:
        """The labelled frames of phase `ed` or `es`, or all of them: `both`."""
        return self.frames if phases == "both" else tuple({self.ed if phases == "ed" else self.es} - {None})


@dataclass(frozen=True)
class Labels(LabelFacts):
    """The labelled frames of one subject."""

    masks: np.ndarray  # (F, Z, H, W) uint8 with ids 0 to 3, one per labelled frame


@np.errstate(all="ignore")
def read_labels(subject: Subject, cine: np.ndarray, geometry: Geometry) -> Labels:
    """Read the label files of a subject whose stored cine is (T, Z, H, W). Raises BrokenSubject.

    A frame is labelled if any of its voxels is. ED is the labelled frame with the largest LV blood pool, ES
    the one with the smallest; if the data set says otherwise, that is a problem of the subject.
    """
    reference = cine_image(subject)
    masks: dict[int, np.ndarray] = {}
    named: dict[str, int] = {}  # {phase: frame} by the files' names
    problems: list[Problem] = []
    for file in subject.labels:

        def note(what: str, done: str = USED, file: LabelFile = file) -> None:
            problems.append(Problem(subject.key, file.path.name, what, done))

        def read(path: Path, note: Note = note) -> np.ndarray:
            return _on_grid(path, reference, geometry, note)

        array = _with_our_ids(subject, file.path, cine.shape, read(file.path))
        if not array.any():
            note("holds no label")
            continue
        for frame, mask in _by_frame(subject, file, array, cine, read, note):
            if mask.any() and frame in masks:
                note(f"belongs to frame {frame}, which has labels already: not used", LEFT_OUT)
            elif mask.any():
                masks[frame] = mask
                named |= {file.phase: frame} if file.phase else {}
    complete = {frame for frame, mask in masks.items() if {1, 2} <= set(np.unique(mask))}
    if len(complete) > 1:  # a frame with a few stray voxels is no end systole
        for frame in sorted(masks.keys() - complete):
            what = f"frame {frame} lacks LV or MYO, others have both: not used"
            problems.append(Problem(subject.key, subject.labels[0].path.name, what, LEFT_OUT))
            del masks[frame]
    frames = tuple(sorted(masks))
    stacked = np.stack([masks[f] for f in frames]) if frames else np.zeros((0, *cine.shape[1:]), np.uint8)
    ed, es, odd = _phases({"ED": subject.ed, "ES": subject.es} | named, stacked, frames)
    odd += [(what, USED) for what in _doubts(stacked, frames, {"ED": ed, "ES": es})]
    problems += [Problem(subject.key, subject.labels[0].path.name, what, done) for what, done in odd]
    return Labels(frames, ed, es, _heart(stacked), tuple(problems), stacked)


def _on_grid(path: Path, reference: nibabel.Nifti1Image, geometry: Geometry, note: Note) -> np.ndarray:
    """The voxels of a file in the canonical axes of its cine, whose file is `reference`: (frames, Z, H, W).
    Used as stored, unless by its affine the file has the cine's grid with axes swapped or reversed.
    """
    image = load(path)
    array = voxels(path, image, scaled=True)
    (to_mm, *_), (reference_to_mm, *_) = grid(image), grid(reference)
    if np.allclose(to_mm, reference_to_mm, atol=1e-3):
        return geometry.to_canonical(array)
    try:
        step = np.linalg.solve(reference_to_mm, to_mm)  # voxel of the file -> voxel of the cine
    except np.linalg.LinAlgError:
        return geometry.to_canonical(array)
    turn = np.rint(np.nan_to_num(step[:3, :3])).astype(int)
    swaps = all((np.abs(turn).sum(axis=axis) == 1).all() for axis in (0, 1))
    if swaps and np.allclose(step[:3, :3], turn, atol=0.02):
        corner = np.where(turn.sum(axis=1) < 0, np.array(reference.shape[:3]) - 1, 0)
        if not np.allclose(step[:3, 3], corner, atol=0.5):
            first = ", ".join(f"{v:.1f}" for v in step[:3, 3])
            what = f"by its affine {path.name} is off its cine's grid (its first voxel is at {first} there)"
            note(what + ": the array was used as stored")
        elif (turn != np.eye(3, dtype=int)).any():
            array = nibabel.apply_orientation(array, nibabel.io_orientation(step))
            note(f"{path.name} is stored in other axes than its cine: turned by its affine", CORRECTED)
    return geometry.to_canonical(array)


def _with_our_ids(subject: Subject, path: Path, shape: Sequence[int], array: np.ndarray) -> np.ndarray:
    """The voxels (frames, Z, H, W) of a label file as uint8 with our ids. Raises BrokenSubject."""
    if array.dtype.kind == "f" and np.isfinite(array).all() and np.abs(array - np.rint(array)).max() < 1e-3:
        array = np.rint(array)
    if array.shape[1:] != tuple(shape[1:]) or len(array) not in (1, shape[0]):
        expected = f"the cine's shape (frames, slices, rows, columns) = {tuple(shape)}"
        raise BrokenSubject(f"{path}: expected {expected}, got {array.shape}")
    known = np.arange(len(subject.label_ids))
    if array.dtype.kind == "f" or array.min() < 0 or array.max() >= len(known):
        ids = np.unique(array)
        if not np.isin(ids, known).all():
            got = ", ".join(f"{i:.9g}" for i in ids[:8]) + (", ..." if len(ids) > 8 else "")
            raise BrokenSubject(f"{path}: expected label ids 0 to {len(known) - 1}, got {got}")
    return np.array(subject.label_ids, np.uint8)[array.astype(np.uint8, copy=False)]


def _by_frame(
    subject: Subject, file: LabelFile, array: np.ndarray, cine: np.ndarray, read: Callable, note: Note
) -> Iterator[tuple[int, np.ndarray]]:
    """(cine frame, mask (Z, H, W)) of each volume of a label file. Raises BrokenSubject."""
    if file.frame is None and file.image is None and len(array) == len(cine):
        yield from enumerate(array)
        return
    frame, table = file.frame, [f for f in (subject.ed, subject.es) if f is not None]
    if file.image is not None:
        frame = _frame_that_shows(file.image, cine, read, note)
        if frame is None:
            return
    elif frame is None and len(table) == 1:
        frame = table[0]
    if frame is None:
        raise BrokenSubject(
            f"{file.path}: expected labels of all {len(cine)} frames, got a 3D file; give a 4D file (zeros "
            "in unlabelled frames), or the frame as ED or ES in the data set's table"
        )
    if not 0 <= frame < len(cine) or len(array) != 1:
        got = f"frame {frame} (counted from 0) with {len(array)} volumes"
        raise BrokenSubject(f"{file.path}: expected one of the cine's {len(cine)} frames, got {got}")
    yield frame, array[0]


def _frame_that_shows(path: Path, cine: np.ndarray, read: Callable, note: Note) -> int | None:
    """The cine frame that correlates best with a labelled image; None, and a problem, if none does."""
    image = read(path)
    if image.shape[1:] != cine.shape[1:] or len(image) != 1:
        note(f"{path.name} has shape {image.shape}, the cine {cine.shape}: not used", LEFT_OUT)
        return None
    wanted, *frames = (v[:, ::_STRIDE, ::_STRIDE].ravel() for v in (image[0], *cine))
    alike = np.nan_to_num([np.corrcoef(pixels, wanted)[0, 1] for pixels in frames])
    frame = int(alike.argmax())
    if alike[frame] < _ALIKE:
        what = f"no frame of the cine looks like {path.name} (best correlation {alike[frame]:.2f}): not used"
        note(what, LEFT_OUT)
        return None
    if alike[frame] < _SAME:
        best = f"frame {frame} is the most alike (correlation {alike[frame]:.4f})"
        note(f"{path.name} is not in the cine; {best}", CORRECTED)
    return frame


def _phases(
    table: dict[str, int | None], masks: np.ndarray, frames: tuple[int, ...]
) -> tuple[int | None, int | None, list[tuple[str, str]]]:
    """(ED frame, ES frame, problems) from the LV blood pools of the labelled frames."""
    said = (table["ED"], table["ES"])  # by the data set
    if not frames:
        return None, None, []
    if len(frames) == 1:  # nothing to compare with: the table decides, else it is ED
        far = [np.inf if t is None else abs(frames[0] - t) for t in said]
        late = far[1] < far[0]
        what = f"the labelled frame is {frames[0]}, the data set says ED {said[0]} and ES {said[1]}"
        what += f" (counted from 0): taken as {'ES' if late else 'ED'}"
        odd = [] if said[late] in (None, frames[0]) else [(what, CORRECTED)]
        return (None, frames[0], odd) if late else (frames[0], None, odd)
    pools = (masks == 1).sum(axis=(1, 2, 3))
    if pools.min() == pools.max():  # nothing tells them apart
        told = set(said) <= set(frames) and said[0] != said[1]
        return (*said, []) if told else (frames[0], frames[-1], [])
    found = (frames[int(pools.argmax())], frames[int(pools.argmin())])
    odd = []
    for phase, f, t in zip(("ED", "ES"), found, said, strict=True):
        if t not in (None, f):
            what = f"{phase} is frame {f} by the labels' blood pool, the data set says {t} (counted from 0)"
            odd.append((what, CORRECTED))
    return *found, odd


def _doubts(masks: np.ndarray, frames: tuple[int, ...], phases: dict[str, int | None]) -> Iterator[str]:
    """Missing phases and classes, slices in the wrong order, LV and RV exchanged."""
    for phase, frame in phases.items() if frames else ():
        if frame is None:
            yield f"{phase} has no labels"
        else:
            ids = np.unique(masks[frames.index(frame)])
            yield from (f"{phase} has no {name}" for id, name in enumerate(CLASSES, 1) if id not in ids)
    areas = (masks == 1).sum(axis=(0, 2, 3))
    third = len(areas) // 3
    if third and areas[:third].mean() < areas[-third:].mean():
        yield "the labels contradict the slice order: the LV is wider in the apical than in the basal third"
    lv, rv = (beside / max(border, 1) for beside, border in (borders(masks, id) for id in (1, 3)))
    if rv > lv:
        what = f"label 3 ({rv:.0%} of its border) rather than around label 1 ({lv:.0%})"
        yield f"the myocardium lies around {what}: are LV and RV exchanged, as in ACDC's numbering?"


def borders(masks: np.ndarray, id: int) -> tuple[int, int]:
    """How many in-plane neighbours of class `id` in masks (T, Z, H, W) are (MYO, any other class)."""
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
    (region,) = regionprops((counts > 0).astype(np.uint8), counts)
    top, left, bottom, right = region.bbox
    return Heart(tuple(map(float, region.centroid_weighted)), (top, bottom - 1, left, right - 1))
