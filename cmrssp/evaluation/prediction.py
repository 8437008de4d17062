"""New cines without labels: every frame segmented, volumes over the cycle, flags for what looks wrong."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from cmrssp import metrics
from cmrssp.data import dataset
from cmrssp.data.cine import Cine, read_cine
from cmrssp.data.labels import borders
from cmrssp.data.layouts.folder import stem_of
from cmrssp.data.nifti import cine_image, write_labels
from cmrssp.data.store import CineRecord, Store
from cmrssp.data.subject import CLASSES, LEFT_OUT, NOT_MEASURED, PLAIN, Subject
from cmrssp.errors import UserError, one_line
from cmrssp.evaluation import contours, plots
from cmrssp.files import sweep
from cmrssp.segmentation import Segmentation, main_component, predict_frames

_OPEN, _SCATTERED, _JUMP = 0.1, 0.01, 0.1  # of the cavity's border, of a class's voxels, of the EDV
_EF = (0.05, 0.9)  # of either ventricle
_APART = 1 / 4  # of the cycle, between the two largest or the two smallest frames
_FEWEST_FRAMES = 5  # of a curve that can have a jump
_NOT_MEASURED, _IMPLAUSIBLE = 7, 5  # severities of flags
_MEASURED = ("frames", "ed_frame", "es_frame", *metrics.clinical({}), "heart_rate_per_min")


class InMemory(Store):
    """One cine with the interface of a store; no file is written."""

    def __init__(self, subject: Subject, cine: Cine) -> None:
        known = {f.name: getattr(cine, f.name) for f in fields(CineRecord) if hasattr(cine, f.name)}
        record = CineRecord(**known, path=subject.cine, offset=0, shape=cine.stored.shape)
        super().__init__([subject], [record], None, [])
        self._stored = cine.stored

    def slice(self, subject: int, frame: int, slice: int) -> np.ndarray:
        return self._stored[frame, slice]

    def volume(self, subject: int, frame: int) -> np.ndarray:
        return self._stored[frame]


def find(paths: Sequence[str], cache: Path, label_suffix: str, out: Path) -> list[Subject]:
    """The cines that the paths name: NIfTI files, and folders in any layout. Leaves out cines below `out`;
    prints which other files it leaves out. Raises UserError and FileNotFoundError.
    """
    subjects = []
    for path in map(Path, paths):
        if path.is_dir():
            try:
                found, problems = dataset.find([str(path.resolve())], cache, label_suffix, ignore_split=True)
            except (FileNotFoundError, UserError) as error:
                raise UserError(str(error).replace("--data", "--predict")) from None
            for problem in problems:
                if problem.done == LEFT_OUT:
                    print(f"not predicted: {problem}")
            subjects += [s for s in found if out.resolve() not in s.cine.resolve().parents]
        elif (stem := stem_of(path.name)) and path.exists():
            subjects.append(Subject(PLAIN, stem, path))
        else:
            expected = "expected .nii or .nii.gz files, or folders of them or of DICOM files"
            raise UserError(
                f"--predict {path}: {expected}, got {'another' if path.exists() else 'no such'} file"
            )
    if not subjects:
        raise UserError(f"--predict: all cines lie in --out {out}, where the results go; give another")
    name, count = Counter(s.file_name for s in subjects).most_common(1)[0]
    if count > 1:
        how = "predict them one after the other, each with its own --out"
        raise UserError(f"--predict: two cines would both be written as {name}; {how}")
    return subjects


def predict(
    subject: Subject, methods: Sequence[Segmentation], device: torch.device, out: Path, **options: bool
) -> tuple[dict, dict]:
    """Segment every frame of a cine, write its label map and pictures to `out`, and return its row of
    clinical.csv and its entry in predictions.json, empty without a label map. An error in one step goes to
    the row's `error`; the other files are written all the same. options: of `segmentation.predict_frames`.
    """
    sweep(out, older_than_s=60)  # half-written files of a prediction that was killed
    row = {"cine": subject.file_name, **dict.fromkeys(_MEASURED), **metrics.indexed({}, None, None)}
    row |= {"severity": 0, "flags": "", "error": ""}
    errors, entry = [], {}

    @contextmanager
    def noting_errors() -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the other steps and the other cines must not suffer
            errors.append(one_line(error).removeprefix(f"{subject.cine}: "))

    with noting_errors():
        cines = InMemory(subject, read_cine(subject))
        record, stem = cines.cines[0], out / subject.file_name
        labels = np.stack([*predict_frames(methods, cines, 0, range(record.shape[0]), device, **options)])
        spacing = (record.geometry.slice_pitch_mm, *record.geometry.spacing_mm)
        volumes = [metrics.volumes_ml(frame, spacing) for frame in labels]
        ml = {name: np.array([each[name] for each in volumes]) for name in CLASSES}
        phases, left_out = find_phases(ml["LV"], record.sound_frames)
        row |= {"frames": len(labels), "ed_frame": phases["ED"], "es_frame": phases.get("ES")}
        if record.measurable:
            row |= metrics.clinical({phase: volumes[t] for phase, t in phases.items()})
            row["heart_rate_per_min"] = record.heart_rate_per_min
        reach_mm = min(method.image_size * method.spacing_mm for method in methods) / 2
        found = flags(labels, ml, record, reach_mm)
        severities = {severity for severity, _ in found}
        row |= {"severity": max(severities, default=0), "flags": "; ".join(what for _, what in found)}
        with noting_errors():
            write_labels(Path(f"{stem}{dataset.PREDICTED}"), labels, record.geometry, cine_image(subject))
            good = good_frames(labels, ml, record.sound_frames, severities)
            entry = {"digest": record.digest, "frames": good}
        with noting_errors():
            cases = [(0, t, f"{subject.id}, {phase}, frame {t}", labels[t]) for phase, t in phases.items()]
            contours.contour_sheet(cines, cases, Path(f"{stem}_contours.png"), columns=6)
        if len(labels) > 1:
            with noting_errors():
                curve = Path(f"{stem}_volumes.png")
                plots.volume_curve(subject.id, ml, curve, record.time_step_s, phases, left_out)
            with noting_errors():
                _draw_beat(cines, labels, phases["ED"], Path(f"{stem}.gif"))
    row |= metrics.indexed(row, subject.height_m, subject.weight_kg)
    if errors:
        row |= {"severity": 8, "error": "; ".join(dict.fromkeys(errors))}
    return row, entry


def good_frames(
    labels: np.ndarray, ml: dict[str, np.ndarray], sound: Collection[int], severities: Collection[int]
) -> list[int]:
    """The `sound` frames of label maps (T, Z, H, W) with all classes, no jump, and an enclosed LV cavity;
    none if the severity of a flag says that the cine was not measured or is implausible.
    """
    if not {_NOT_MEASURED, _IMPLAUSIBLE}.isdisjoint(severities):
        return []
    whole = [t for t in sorted(sound) if all(ml[name][t] > 0 for name in CLASSES)]
    odd = {*jumps(ml["LV"], sound), *jumps(ml["RV"], sound)}
    return [t for t in whole if t not in odd and _open_part(labels[t : t + 1]) <= _OPEN]


def _open_part(labels: np.ndarray) -> float:
    """What part of the LV cavity's border, over all frames (T, Z, H, W), is not myocardium."""
    beside, border = borders(labels, 1)
    return (border - beside) / max(border, 1)


def find_phases(lv_ml: np.ndarray, sound: Collection[int]) -> tuple[dict[str, int], list[int]]:
    """({ED: frame of the largest LV, ES: of the smallest}, frames left out), from the LV volume of each frame
    (T,). Left out are frames that are not `sound`, have no LV, or jump out of the curve, unless these are all
    frames. If only one remains, there is no ES.
    """
    every, odd = range(len(lv_ml)), jumps(lv_ml, sound)
    kept = [t for t in every if t in sound and lv_ml[t] > 0 and t not in odd] or list(every)
    phases = {"ED": max(kept, key=lv_ml.__getitem__), "ES": min(kept, key=lv_ml.__getitem__)}
    if len(kept) == 1:
        del phases["ES"]
    return phases, [t for t in every if t not in kept]


def jumps(ml: np.ndarray, sound: Collection[int]) -> list[int]:
    """The `sound` frames with a volume that lie far from both neighbours in a curve (T,) over one cycle."""
    frames = [t for t in sorted(sound) if ml[t] > 0]
    curve, found = ml[frames], []
    for i, t in enumerate(frames) if len(frames) >= _FEWEST_FRAMES else ():
        rest = np.delete(curve, i)  # a jump must not raise its own limit
        # how far the turn of a sound curve lies from both neighbours, with systole in a third of the cycle
        turn = np.ptp(rest) / 2 * (1 - np.cos(min(np.pi, 3 * np.pi / len(curve))))
        median = np.median([curve[i - 1], curve[i], curve[(i + 1) % len(curve)]])
        if abs(curve[i] - median) > _JUMP * rest.max() + turn:
            found.append(t)
    return found


def flags(
    labels: np.ndarray, ml: dict[str, np.ndarray], record: CineRecord, reach_mm: float
) -> list[tuple[int, str]]:
    """(severity, what) for all that looks wrong in a cine and its label maps (T, Z, H, W), worst first. ml:
    the volume of each class and frame, (T,). `reach_mm`: half the side of the network's crop.
    """
    found = [(_NOT_MEASURED if p.done == NOT_MEASURED else 1, p.what) for p in record.problems]
    absent = [name for name in CLASSES if not ml[name].any()]
    if absent:
        found.append((6, f"no {' and no '.join(absent)} in any frame"))
    if "LV" not in absent and (lost := np.count_nonzero(ml["LV"] == 0)):
        found.append((6, f"no LV in {lost} of {len(labels)} frames"))
    phases, left_out = find_phases(ml["LV"], record.sound_frames)
    for name in ("LV", "RV") if "ES" in phases else ():
        at_ed, at_es = (ml[name][phases[phase]] for phase in ("ED", "ES"))
        if name not in absent and not at_ed:
            found.append((_IMPLAUSIBLE, f"no {name} at ED"))
        elif name not in absent and not _EF[0] < (ejected := 1 - at_es / at_ed) < _EF[1]:
            what = f"implausible {name} ejection fraction of {100 * ejected:.0f} %"
            found.append((_IMPLAUSIBLE, what))
    if (open_part := _open_part(labels)) > _OPEN:
        found.append((4, f"LV cavity not enclosed by myocardium ({100 * open_part:.0f} % of its border)"))
    for name in ("LV", "RV"):
        if frames := jumps(ml[name], record.sound_frames):
            found.append((3, f"jump in the {name} volume at frame {', '.join(map(str, frames[:5]))}"))
    found += [(3, what) for what in _far_apart(ml["LV"], left_out)]
    scattered = [n for id, n in enumerate(CLASSES, 1) if _outside_main(labels == id) > _SCATTERED]
    if scattered:
        found.append((2, f"more than one component: {', '.join(scattered)}"))
    spacing = record.geometry.spacing_mm
    limit_mm, places = reach_mm - 2 * max(spacing), np.nonzero(labels.any(axis=0))[1:]
    distances_mm = (abs(at - c) * mm for at, c, mm in zip(places, record.centre, spacing, strict=True))
    if any((distance > limit_mm).any() for distance in distances_mm):
        found.append((1, "touches the edge of the crop"))
    return sorted(found, key=lambda flag: -flag[0])


def _far_apart(lv_ml: np.ndarray, left_out: Sequence[int]) -> Iterator[str]:
    """A flag for the two largest, or the two smallest, frames if they lie far apart in the cycle."""
    kept = np.setdiff1d(np.arange(len(lv_ml)), left_out)
    for what, order in (("largest", -1), ("smallest", 1)) if len(kept) >= 2 * _FEWEST_FRAMES else ():
        first, second = kept[np.argsort(order * lv_ml[kept], kind="stable")[:2]]
        distance = abs(first - second)
        if min(distance, len(lv_ml) - distance) > _APART * len(lv_ml):
            yield f"the two {what} LV volumes lie far apart, at frames {first} and {second}"


def _outside_main(masks: np.ndarray) -> float:
    """The share of voxels outside the largest 3D component, in the worst frame of (T, Z, H, W)."""
    counts = ((np.count_nonzero(main_component(m)), np.count_nonzero(m)) for m in masks)
    return max(1 - main / every if every else 0.0 for main, every in counts)


def _draw_beat(cines: Store, labels: np.ndarray, ed: int, path: Path) -> None:
    """The slice in the middle of the LV at ED, over all frames."""
    record, spacing = cines.cines[0], cines.cines[0].geometry.spacing_mm
    found = np.flatnonzero((labels[ed] == 1).any(axis=(1, 2)))
    z = int(found[len(found) // 2]) if len(found) else record.shape[1] // 2
    box = contours.around(record.centre, spacing)
    images = np.stack([cines.slice(0, t, z)[box] for t in range(len(labels))])
    contours.animate(images, labels[(slice(None), z, *box)], spacing, path, record.time_step_s)
