"""New cines, without masks or frame numbers: every frame segmented, volumes over the cycle, odd results."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from cmrssp import metrics
from cmrssp.data import dataset, store
from cmrssp.data.labels import borders
from cmrssp.data.layouts.folder import stem_of
from cmrssp.data.nifti import cine_image, write_labels
from cmrssp.data.store import CineRecord
from cmrssp.data.subject import CLASSES, LEFT_OUT, PLAIN, Subject
from cmrssp.errors import UserError
from cmrssp.evaluation import plots, report
from cmrssp.evaluation.gif import animate
from cmrssp.segmentation import Segmentation, predict_frames

_OPEN, _SCATTERED, _JUMP = 0.1, 0.01, 0.1  # of the cavity's border, of a class's voxels, of the EDV
_EF = (0.05, 0.9)  # of either ventricle


def find(paths: Sequence[str], cache: Path, label_suffix: str, out: Path) -> list[Subject]:
    """The cines that the paths name: NIfTI files, and folders in any layout; what lies below `out` is not
    taken, and what else is left out is said. Raises UserError and FileNotFoundError.
    """
    subjects = []
    for path in map(Path, paths):
        if path.is_dir():
            try:
                found, problems = dataset.find([str(path.resolve())], cache, label_suffix)
            except (FileNotFoundError, UserError) as error:
                raise UserError(str(error).replace("--data", "--predict")) from None
            for problem in problems:
                if problem.done == LEFT_OUT:
                    print(f"not predicted: {problem}")
            kept = [s for s in found if out.resolve() not in s.cine.resolve().parents]
            if not kept:
                raise UserError(
                    f"--predict {path}: its cines all lie in {out}, where the results go; give another --out"
                )
            subjects += kept
        elif not path.exists():
            raise FileNotFoundError(f"--predict {path}: no such file or folder")
        elif stem := stem_of(path.name):
            subjects.append(Subject(PLAIN, stem, path))
        else:
            raise UserError(
                f"--predict {path}: expected .nii or .nii.gz files, or folders of them or of DICOM files"
            )
    names = Counter(s.file_name for s in subjects)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(
            f"--predict: two cines would both be written as {twice[0]}; predict them one after the other, "
            "each with an --out of its own, or give the folder that holds both"
        )
    return subjects


def predict(
    subject: Subject, methods: Sequence[Segmentation], device: torch.device, out: Path, **options: bool
) -> dict:
    """Segment every frame of a cine; write its label map and pictures to `out`; the row of clinical.csv.

    Raises BrokenSubject. `options` are those of `segmentation.predict_frames`.
    """
    with tempfile.TemporaryDirectory(prefix=".", dir=out) as folder:
        cines = store.build([subject], Path(folder), labels=False, progress=False)
        record = cines.cines[0]
        frames = list(range(record.shape[0]))
        labels = np.stack(list(predict_frames(methods, cines, 0, frames, device, **options)))
        write_labels(out / f"{subject.file_name}_labels.nii.gz", labels, record.geometry, cine_image(subject))
        spacing = (record.geometry.slice_pitch_mm, *record.geometry.spacing_mm)
        volumes = [metrics.volumes_ml(frame, spacing) for frame in labels]
        lv = np.array([v["LV"] for v in volumes])
        ed, es = int(lv.argmax()), int(lv.argmin())
        phases = {"ED": volumes[ed], "ES": volumes[es]} if len(frames) > 1 else {"ED": volumes[0]}
        reach = min(method.image_size * method.spacing_mm for method in methods) / 2
        _pictures(cines, labels, volumes, ed, es, out / subject.file_name)
    step = record.time_step_s
    found = flags(labels, volumes, record, reach)
    return {
        "cine": subject.file_name,
        "frames": len(frames),
        "ed_frame": ed,
        "es_frame": es if len(frames) > 1 else None,
        **metrics.clinical(phases),
        "heart_rate_per_min": 60 / (step * len(frames)) if step and len(frames) > 1 else None,
        "severity": max((severity for severity, _ in found), default=0),
        "flags": "; ".join(what for _, what in found),
    }


def _pictures(cines: store.Store, labels: np.ndarray, volumes: list, ed: int, es: int, stem: Path) -> None:
    record, key = cines.cines[0], cines.subjects[0].id
    cases = [
        report.case(cines, 0, frame, f"{key}, {phase}, frame {frame}", labels[frame], truth=False)
        for phase, frame in {"ED": ed, "ES": es}.items()
        if phase == "ED" or es != ed
    ]
    report.contour_sheet(cases, stem.with_name(f"{stem.name}_contours.png"), columns=6)
    if len(labels) == 1:
        return
    step = record.time_step_s
    curve = {
        "time_ms": np.arange(len(labels)) * step * 1000 if step else None,
        "lv_ml": np.array([v["LV"] for v in volumes]),
        "rv_ml": np.array([v["RV"] for v in volumes]),
        "ed": ed,
        "es": es,
    }
    plots.volume_curve(key, curve, stem.with_name(f"{stem.name}_volumes.png"))
    found = np.flatnonzero((labels[ed] == 1).any(axis=(1, 2)))
    z = int(found[len(found) // 2]) if len(found) else record.shape[1] // 2
    images = np.stack([cines.slice(0, t, z) for t in range(len(labels))])
    box = report.around(record.centre, record.geometry.spacing_mm)
    animate(
        images[(slice(None), *box)],
        labels[(slice(None), z, *box)],
        record.geometry.spacing_mm,
        stem.with_name(f"{stem.name}.gif"),
        step,
    )


def flags(
    labels: np.ndarray, volumes: Sequence[dict], record: CineRecord, reach_mm: float
) -> list[tuple[int, str]]:
    """(severity, what) of all that looks wrong in the label maps (T, Z, H, W) of a cine, worst first.

    `reach_mm` is half the side of the crop that the network saw.
    """
    found = []
    ml = {name: np.array([v[name] for v in volumes]) for name in CLASSES}
    absent = [n for id, n in enumerate(CLASSES, 1) if not (labels == id).any()]
    if absent:
        found.append((6, f"no {' and no '.join(absent)} in any frame"))
    lost = [t for t, v in enumerate(volumes) if "LV" not in absent and v["LV"] == 0]
    if lost:
        found.append((6, f"no LV in {len(lost)} of {len(labels)} frames"))
    ed, es = int(ml["LV"].argmax()), int(ml["LV"].argmin())
    for name in ("LV", "RV") if len(labels) > 1 else ():
        if name not in absent and not ml[name][ed]:
            found.append((5, f"no {name} at ED"))
        elif name not in absent and not _EF[0] < (ejected := 1 - ml[name][es] / ml[name][ed]) < _EF[1]:
            found.append((5, f"implausible {name} ejection fraction of {100 * ejected:.0f} %"))
    beside, border = borders(labels, 1)
    open_to_others = border - beside  # pixels of the border that are not myocardium
    if open_to_others > _OPEN * border:
        share = f"{100 * open_to_others / border:.0f} % of its border"
        found.append((4, f"LV cavity not enclosed by myocardium ({share})"))
    scattered = [n for id, n in enumerate(CLASSES, 1) if _outside_largest(labels == id) > _SCATTERED]
    if scattered:
        found.append((2, f"more than one component: {', '.join(scattered)}"))
    for name in ("LV", "RV") if len(labels) > 4 else ():
        curve = ml[name]
        smooth = np.median([np.roll(curve, 1), curve, np.roll(curve, -1)], axis=0)
        # what the turn of a sound curve may be, with systole in a third of the cycle
        turn = np.ptp(curve) / 2 * (1 - np.cos(min(np.pi, 3 * np.pi / len(curve))))
        jumps = np.flatnonzero(np.abs(curve - smooth) > _JUMP * curve.max() + turn)
        if len(jumps):
            found.append((3, f"jump in the {name} volume at frame {', '.join(map(str, jumps[:5]))}"))
    rows, columns = (np.flatnonzero(labels.any(axis=axes)) for axes in ((0, 1, 3), (0, 1, 2)))
    at = [
        np.abs(line - centre).max() * spacing
        for line, centre, spacing in zip(
            (rows, columns), record.centre, record.geometry.spacing_mm, strict=True
        )
        if len(line)
    ]
    if at and max(at) > reach_mm - 2 * max(record.geometry.spacing_mm):
        found.append((1, "touches the edge of the crop"))
    found += [(1, problem.what) for problem in record.problems]
    return sorted(found, key=lambda flag: -flag[0])


def _outside_largest(masks: np.ndarray) -> float:
    """The largest share, over the frames (T, Z, H, W), of voxels that are not in the largest 3D component."""
    worst = 0.0
    for mask in masks:
        components, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
        if count > 1:
            sizes = np.bincount(components.ravel())[1:]
            worst = max(worst, 1 - sizes.max() / sizes.sum())
    return worst
