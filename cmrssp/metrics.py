"""Figures of merit on label maps: overlap, distances between surfaces, volumes, clinical numbers."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects, generate_binary_structure

from cmrssp.data.subject import CLASSES

MYOCARDIUM_G_PER_ML = 1.05  # density, as in the SCMR recommendations, doi 10.1186/s12968-020-00610-6
DISTANCES = ("hausdorff", "hd95", "assd")


def overlap(prediction: np.ndarray, reference: np.ndarray) -> dict[str, tuple[int, int]]:
    """{class: (voxels in both maps, voxels of one map plus voxels of the other)} of two label maps of one
    shape, any number of axes. Raises ValueError where the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"expected label maps of one shape, got {prediction.shape} and {reference.shape}")
    counts = {}
    for id, name in enumerate(CLASSES, start=1):
        ours, theirs = prediction == id, reference == id
        both = int(np.count_nonzero(ours & theirs))
        counts[name] = both, int(np.count_nonzero(ours)) + int(np.count_nonzero(theirs))
    return counts


def dice_of(both: int, total: int, neither: float = 1.0) -> float:
    """Dice from the counts of `overlap`: 2 |A and B| / (|A| + |B|); `neither` where both are empty."""
    return 2 * both / total if total else neither


def dice(prediction: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Dice of each class of two label maps of one shape (any number of axes). A structure that is in neither
    map scores 1, one that is in one of them 0. Raises ValueError where the shapes differ.
    """
    return {name: dice_of(*counts) for name, counts in overlap(prediction, reference).items()}


def present_classes(references: Iterable[np.ndarray]) -> list[str]:
    """The classes that at least one of the reference label maps has, in the order of CLASSES."""
    found: set[int] = set()
    for labels in references:
        found |= {id for id in range(1, len(CLASSES) + 1) if (labels == id).any()}
    return [name for id, name in enumerate(CLASSES, start=1) if id in found]


def mean_dice(scores: Sequence[Mapping[str, float]], present: Sequence[str]) -> dict[str, float]:
    """From the Dice of each label map (`dice`): dice_<class>, the mean over the maps, of the classes in
    `present`, and dice, the mean of those. Empty without a score or a class. A class that no reference has
    would score 1 wherever it is not predicted, so `present` leaves it out (`present_classes`).
    """
    means = {f"dice_{name}": float(np.mean([score[name] for score in scores])) for name in present if scores}
    return {"dice": float(np.mean(list(means.values()))), **means} if means else {}


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float]
) -> dict[str, float | bool]:
    """Distances between the surfaces of one structure, in mm: hausdorff_mm, hd95_mm, assd_mm.

    prediction, reference (Z, H, W) bool; spacing_mm: slice pitch, row, column. A surface voxel has at least
    one of its six neighbours outside the structure; beyond the array is outside. In a stack of a single slice
    the surface is the contour, and the four neighbours in the slice count. Each surface voxel of one map is
    measured to the nearest one of the other, centre to centre: two directed sets of distances.

    hausdorff: the largest of all. hd95: the larger of the two directed 95th percentiles (linear between order
    statistics), as in MONAI; DeepMind's surface-distance does the same with surface voxels weighted by area;
    MedPy takes one percentile of both sets pooled, where an error of the smaller surface counts less. assd:
    the mean over both sets pooled, as in MONAI and MedPy.

    A structure that is in only one of the maps is `missed`: its distances are NaN, and the columns
    `..._filled_mm` hold the diagonal of the image, corner to corner, which no distance in it exceeds.
    Otherwise these columns repeat the distances. A structure in neither map is `absent`: all six are NaN.

    Raises ValueError where shapes differ or are not 3D, or the spacing is not three positive numbers.
    """
    if prediction.ndim != 3 or prediction.shape != reference.shape:
        raise ValueError(
            f"surface_distances: expected two masks of one shape (Z, H, W), got {prediction.shape} and "
            f"{reference.shape}"
        )
    spacing = _spacing("surface_distances", spacing_mm)
    prediction, reference = prediction.astype(bool, copy=False), reference.astype(bool, copy=False)
    found = int(prediction.any()) + int(reference.any())
    measured = dict.fromkeys(DISTANCES, math.nan)
    filled = measured
    if found == 2:
        filled = measured = _distances(prediction, reference, spacing)
    elif found == 1:
        filled = dict.fromkeys(DISTANCES, float(np.linalg.norm(np.array(prediction.shape) * spacing)))
    return {
        **{f"{name}_mm": value for name, value in measured.items()},
        **{f"{name}_filled_mm": value for name, value in filled.items()},
        "missed": found == 1,
        "absent": found == 0,
    }


def volumes_ml(labels: np.ndarray, spacing_mm: Sequence[float]) -> dict[str, float]:
    """Volume of each class as the sum of discs: voxels x pitch x row x column. labels (Z, H, W), ids 0..3."""
    voxel_ml = float(np.prod(_spacing("volumes_ml", spacing_mm))) / 1000
    return {name: int((labels == id).sum()) * voxel_ml for id, name in enumerate(CLASSES, start=1)}


def score(
    prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float]
) -> dict[str, dict[str, float | bool]]:
    """Everything about each class of a predicted and a reference label map, both (Z, H, W) with ids 0..3.

    Per class: dice (see `dice`), in_reference (whether the reference has it), the columns of
    `surface_distances`, volume_ml and reference_ml, and volume_error_ml, positive where the prediction is
    larger. spacing_mm: slice pitch, row, column.
    """
    scores = dice(prediction, reference)
    ours, theirs = volumes_ml(prediction, spacing_mm), volumes_ml(reference, spacing_mm)
    return {
        name: {
            "dice": scores[name],
            "in_reference": bool((reference == id).any()),
            **surface_distances(prediction == id, reference == id, spacing_mm),
            "volume_ml": ours[name],
            "reference_ml": theirs[name],
            "volume_error_ml": ours[name] - theirs[name],
        }
        for id, name in enumerate(CLASSES, start=1)
    }


def clinical(volumes: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """Clinical numbers of one subject from {phase: volume in ml of each class}; phases ED and ES.

    lv_edv_ml, lv_esv_ml, lv_sv_ml = EDV - ESV, lv_ef_percent = 100 SV / EDV, the same of rv, and lv_mass_g,
    the myocardium at ED. None where its phase is missing or its volume is not finite, and for the ejection
    fraction of a ventricle with an EDV of 0.
    """
    numbers: dict[str, float | None] = {}
    for ventricle in ("LV", "RV"):
        edv, esv = (_finite(volumes.get(phase, {}).get(ventricle)) for phase in ("ED", "ES"))
        stroke = None if edv is None or esv is None else edv - esv
        name = ventricle.lower()
        numbers[f"{name}_edv_ml"], numbers[f"{name}_esv_ml"], numbers[f"{name}_sv_ml"] = edv, esv, stroke
        numbers[f"{name}_ef_percent"] = 100 * stroke / edv if edv and stroke is not None else None
    wall = _finite(volumes.get("ED", {}).get("MYO"))
    numbers["lv_mass_g"] = None if wall is None else MYOCARDIUM_G_PER_ML * wall
    return numbers


def indexed(
    numbers: Mapping[str, float | None], height_m: float | None, weight_kg: float | None
) -> dict[str, float | None]:
    """Body surface area (Du Bois and Du Bois, Arch Intern Med 17(6), 1916) and the volumes and the mass in
    `numbers` (as from `clinical`) by square metre of it; None where one of the two is not known.
    """
    area = 0.007184 * weight_kg**0.425 * (100 * height_m) ** 0.725 if height_m and weight_kg else None
    names = ("lv_edv_ml", "lv_esv_ml", "lv_sv_ml", "rv_edv_ml", "rv_esv_ml", "rv_sv_ml", "lv_mass_g")
    values = {name: numbers.get(name) for name in names}
    return {"body_surface_m2": area} | {
        f"{name}_per_m2": None if area is None or value is None else value / area
        for name, value in values.items()
    }


def _distances(prediction: np.ndarray, reference: np.ndarray, spacing: np.ndarray) -> dict[str, float]:
    """`surface_distances` of two structures that are both there."""
    box = find_objects((prediction | reference).view(np.uint8))[
        0
    ]  # nothing outside it is nearest to anything
    neighbours = generate_binary_structure(3, 1)
    if len(prediction) == 1:
        neighbours[::2] = False
    surfaces = [mask & ~binary_erosion(mask, neighbours) for mask in (prediction[box], reference[box])]
    to_reference, to_prediction = (
        distance_transform_edt(~other, sampling=spacing)[surface]
        for surface, other in zip(surfaces, surfaces[::-1], strict=True)
    )
    return {
        "hausdorff": float(max(to_reference.max(), to_prediction.max())),
        "hd95": float(max(np.percentile(to_reference, 95), np.percentile(to_prediction, 95))),
        "assd": float((to_reference.sum() + to_prediction.sum()) / (to_reference.size + to_prediction.size)),
    }


def _spacing(function: str, spacing_mm: Sequence[float]) -> np.ndarray:
    spacing = np.asarray(spacing_mm, float)
    if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
        raise ValueError(
            f"{function}: expected spacing_mm as three positive numbers (slice pitch, row, column), "
            f"got {spacing_mm}"
        )
    return spacing


def _finite(volume: float | None) -> float | None:
    return None if volume is None or not math.isfinite(volume) else float(volume)
