"""The labels of one subject: read, brought to the frames of its cine, and checked."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import nibabel
import numpy as np
from nibabel import orientations

from cmrssp.data.cine import CineFacts
from cmrssp.data.nifti import cine_image, grid, load, voxels
from cmrssp.data.subject import CLASSES, CORRECTED, LEFT_OUT, USED, BrokenSubject, Problem, Subject, listed

_ALIKE = 0.9  # correlation of a labelled image with its frame of the cine
_STRIDE = 3  # of the pixels that are compared


@dataclass(frozen=True)
class LabelFacts:
    """What is known of a subject's labels without the masks."""

    frames: tuple[int, ...]  # the cine frames with labels
    ed: int | None  # cine frames of end diastole and end systole, None where unlabelled
    es: int | None
    box: tuple[int, int, int, int] | None  # first and last row, first and last column with any label
    distance_mm: float | None  # from the crop centre to the centroid of all labels
    reach_mm: float | None  # how far the labels reach from the crop centre, along rows or columns
    digest: str  # of frames and masks
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
def read_labels(subject: Subject, cine: CineFacts, stored: np.ndarray) -> Labels:
    """Read the label files of a subject whose `stored` cine is (T, Z, H, W). Raises BrokenSubject.

    Of several labelled frames ED has the largest LV blood pool and ES the smallest, whatever the table says.
    The table decides for a single frame, and where the pools are equal.
    """
    reader = _Reader(subject, cine, stored)
    for file in subject.labels:
        reader.add(file)
    return reader.labels()


class _Reader:
    """Collects the masks of a subject's label files, and what is odd about them."""

    def __init__(self, subject: Subject, cine: CineFacts, stored: np.ndarray) -> None:
        self.subject, self.cine, self.stored, self.reference = subject, cine, stored, cine_image(subject)
        self.masks: dict[int, np.ndarray] = {}
        self.told = {"ED": subject.ed, "ES": subject.es}  # by the data set's table, or by a file's name
        self.problems: list[Problem] = []

    def note(self, what: str, done: str = USED, file: Path | None = None) -> None:
        name = (file or self.subject.labels[0].path).name
        self.problems.append(Problem(self.subject.key, name, what, done))

    def add(self, file) -> None:
        """Read a LabelFile of one frame, or of all."""
        array = self._with_our_ids(file.path)
        table = {self.subject.ed, self.subject.es} - {None}
        frame = table.pop() if file.frame is None and len(table) == 1 else file.frame
        if not array.any():
            self.note("holds no label", USED, file.path)
            frames = []
        elif file.image:
            frames = self._frames_that_show(file.image)
        elif file.frame is None and len(array) == len(self.stored):
            frames = range(len(array))
        elif frame is not None and frame < len(self.stored) and len(array) == 1:
            frames = [frame]
        else:
            expected = f"labels of all {len(self.stored)} frames (zeros where there are none)"
            more = "or of one, which the data set's table gives as its only ED or ES, counted from 0"
            got = f"{len(array)} volumes, frame {frame}"
            raise BrokenSubject(f"{file.path}: expected {expected}, {more}; got {got}")
        for frame, mask in zip(frames, array, strict=False):
            if mask.any():
                self.masks[frame] = mask
                self.told |= {file.phase: frame} if file.phase and len(array) == 1 else {}

    def _with_our_ids(self, path: Path) -> np.ndarray:
        """The voxels (frames, Z, H, W) of a label file as uint8 with our ids. Raises BrokenSubject."""
        array, last = self._on_grid(path), len(self.subject.label_ids) - 1
        if array.dtype.kind == "f" and np.abs(array - np.rint(array)).max() < 1e-3:
            array = np.rint(array)
        if array.dtype.kind == "f" or array.min() < 0 or array.max() > last:
            ids = np.unique(array)
            if not np.isin(ids, range(last + 1)).all():
                got = listed([f"{id:.9g}" for id in ids])
                raise BrokenSubject(f"{path}: expected label ids 0 to {last}, got {got}")
        return np.array(self.subject.label_ids, np.uint8)[array.astype(np.uint8, copy=False)]

    def _on_grid(self, path: Path) -> np.ndarray:
        """A file in its cine's canonical axes, (frames, Z, H, W): as stored, unless its affine says that they
        are swapped or reversed on the cine's grid. Raises BrokenSubject.
        """
        image = load(path)
        array = voxels(path, image, scaled=True)
        try:
            step = np.linalg.solve(grid(self.reference)[0], grid(image)[0])  # from its voxels to the cine's
            turn = nibabel.io_orientation(step)
            rest = step @ orientations.inv_ornt_aff(turn, image.shape[:3])  # once it is turned
        except (np.linalg.LinAlgError, orientations.OrientationError):  # an affine that says nothing
            rest = np.zeros((4, 4))
        if np.allclose(rest[:3, :3], np.eye(3), atol=0.02):
            if not np.allclose(rest[:3, 3], 0, atol=0.5):
                first = ", ".join(f"{v:.1f}" for v in step[:3, 3])
                what = f"off its cine's grid by its affine (its first voxel is at {first} there)"
                self.note(f"{what}: the array was used as stored", USED, path)
            elif (turn != [[0, 1], [1, 1], [2, 1]]).any():
                array = nibabel.apply_orientation(array, turn)
                self.note("stored in other axes than its cine: turned by its affine", CORRECTED, path)
        array = self.cine.geometry.to_canonical(array)
        if array.shape[1:] != self.stored.shape[1:] or len(array) not in (1, len(self.stored)):
            expected = f"the cine's shape (frames, slices, rows, columns) = {self.stored.shape}"
            raise BrokenSubject(f"{path}: expected {expected}, got {array.shape}")
        return array

    def _frames_that_show(self, path: Path) -> list[int]:
        """The cine frame that correlates best with a labelled image; none if none does."""
        volumes = (self._on_grid(path)[0], *self.stored)
        wanted, *frames = (volume[:, ::_STRIDE, ::_STRIDE].ravel() for volume in volumes)
        alike = np.nan_to_num([np.corrcoef(pixels, wanted)[0, 1] for pixels in frames])
        if alike.max() >= _ALIKE:
            return [int(alike.argmax())]
        what = f"no frame of the cine looks like {path.name} (best correlation {alike.max():.2f}): not used"
        self.note(what, LEFT_OUT, path)
        return []

    def labels(self) -> Labels:
        """What all files together say."""
        complete = [frame for frame, mask in self.masks.items() if {1, 2} <= set(np.unique(mask))]
        used = complete if len(complete) > 1 else self.masks  # a frame with a few stray voxels is no ES
        for frame in sorted(self.masks.keys() - set(used)):
            self.note(f"frame {frame} lacks LV or MYO, others have both: not used", LEFT_OUT)
        frames = tuple(sorted(used))
        masks = np.zeros((len(frames), *self.stored.shape[1:]), np.uint8)
        ed = es = box = distance_mm = reach_mm = None
        if frames:
            masks[:] = [self.masks[frame] for frame in frames]
            ed, es = self._phases(masks, frames)
            for what in _doubts(masks, frames, {"ED": ed, "ES": es}):
                self.note(what)
            at = np.argwhere(masks)[:, 2:]
            box = tuple(np.stack([at.min(axis=0), at.max(axis=0)], axis=1).ravel().tolist())
            from_centre = (at - self.cine.centre) * self.cine.geometry.spacing_mm
            distance_mm = float(np.hypot(*from_centre.mean(axis=0)))
            reach_mm = float(np.abs(from_centre).max())
        digest = sha256(json.dumps([frames, ed, es]).encode() + masks.tobytes()).hexdigest()
        return Labels(frames, ed, es, box, distance_mm, reach_mm, digest, tuple(self.problems), masks)

    def _phases(self, masks: np.ndarray, frames: tuple[int, ...]) -> tuple[int | None, int | None]:
        """(ED frame, ES frame) by the LV blood pools of the labelled frames, else by what was `told`."""
        ed, es = self.told["ED"], self.told["ES"]
        pools = (masks == 1).sum(axis=(1, 2, 3))
        if len(frames) == 1:
            far = {p: np.inf if t is None else abs(frames[0] - t) for p, t in self.told.items()}
            found = {"ES" if far["ES"] < far["ED"] else "ED": frames[0]}
        elif pools.min() < pools.max():
            found = {"ED": frames[int(pools.argmax())], "ES": frames[int(pools.argmin())]}
        else:
            return (ed, es) if {ed, es} <= set(frames) and ed != es else (frames[0], frames[-1])
        for phase, frame in found.items():
            if self.told[phase] not in (None, frame):
                what = f"{phase} is frame {frame} by the labels, the data set says ED {ed} and ES {es}"
                self.note(f"{what} (counted from 0)", CORRECTED)
        return found.get("ED"), found.get("ES")


def _doubts(masks: np.ndarray, frames: tuple[int, ...], phases: dict[str, int | None]) -> Iterator[str]:
    """Missing phases and classes, slices in the wrong order, LV and RV exchanged."""
    for phase, frame in phases.items():
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
    pairs = []
    for axis in (2, 3):
        low, high = np.moveaxis(masks, axis, 0)[:-1], np.moveaxis(masks, axis, 0)[1:]
        pairs += [(low, high), (high, low)]
    beside = np.concatenate([outer[(inner == id) & (outer != id)] for inner, outer in pairs])
    return int(np.count_nonzero(beside == 2)), beside.size
