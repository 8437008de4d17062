"""Metrics of label maps: overlap, surface distances, volumes, clinical numbers."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy import ndarray
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects, generate_binary_structure

from cmrssp.data.subject import CLASSES

MYOCARDIUM_G_PER_ML = 1.05  # density, as in the SCMR recommendations, doi 10.1186/s12968-020-00610-6


def overlap(prediction: ndarray, reference: ndarray) -> dict[str, tuple[int, int]]:
    """{class: (voxels in both, voxels of one plus those of the other)}. Raises ValueError for different
    shapes.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"expected label maps of one shape, got {prediction.shape} and {reference.shape}")
    counts = {}
    for id, name in enumerate(CLASSES, start=1):
        ours, theirs = prediction == id, reference == id
        total = np.count_nonzero(ours) + np.count_nonzero(theirs)
        counts[name] = np.count_nonzero(ours & theirs), total
    return counts


def dice_of(both: int, total: int, neither: float = 1.0) -> float:
    """Dice from the counts of `overlap`: 2 |A and B| / (|A| + |B|); `neither` if both are empty."""
    return 2 * both / total if total else neither


def dice(prediction: ndarray, reference: ndarray) -> dict[str, float]:
    """{class: Dice} of two label maps of one shape: 1 if neither has the class, 0 if only one has it."""
    return {name: dice_of(*counts) for name, counts in overlap(prediction, reference).items()}


def surface_distances(
    prediction: ndarray, reference: ndarray, spacing_mm: Sequence[float]
) -> dict[str, float]:
    """Distances between the surfaces of one structure, in mm: hausdorff_mm, hd95_mm, assd_mm. prediction,
    reference (Z, H, W) bool; spacing_mm: slice pitch, row, column.

    A surface voxel has one of its six neighbours (four in a stack of one slice) outside the structure or the
    array. Its distance is that to the nearest surface voxel of the other map, centre to centre, which gives
    two directed sets. hausdorff: the largest distance. hd95: the larger of the two directed 95th percentiles,
    interpolated linearly, as in MONAI (DeepMind weights voxels by area, MedPy pools the sets). assd: the mean
    of both sets pooled, as in MONAI and MedPy. A structure in only one map is `missed`: its distances are
    NaN, and the columns `..._filled_mm`, which else repeat them, hold the diagonal of the volume. A structure
    in neither map is `absent`: all six are NaN.
    """
    found = int(prediction.any()) + int(reference.any())
    filled = measured = dict.fromkeys(("hausdorff", "hd95", "assd"), math.nan)
    if found == 2:
        filled = measured = _distances(prediction, reference, spacing_mm)
    elif found == 1:
        filled = dict.fromkeys(measured, math.hypot(*np.multiply(prediction.shape, spacing_mm)))
    columns = {f"{name}_mm": value for name, value in measured.items()}
    columns |= {f"{name}_filled_mm": value for name, value in filled.items()}
    return {**columns, "missed": found == 1, "absent": found == 0}


def volumes_ml(labels: ndarray, spacing_mm: Sequence[float]) -> dict[str, float]:
    """Volume of each class as the sum of discs: voxels x pitch x row x column. labels (Z, H, W), ids 0..3."""
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    return {name: int((labels == id).sum()) * voxel_ml for id, name in enumerate(CLASSES, start=1)}


def score(
    prediction: ndarray, reference: ndarray, spacing_mm: Sequence[float]
) -> dict[str, dict[str, float]]:
    """{class: dice, in_reference (whether the reference has it), the columns of `surface_distances`,
    volume_ml, reference_ml, volume_error_ml} of two label maps (Z, H, W) with ids 0..3. spacing_mm: slice
    pitch, row, column. Raises ValueError for different shapes.
    """
    scores = dice(prediction, reference)
    ours, theirs = (volumes_ml(labels, spacing_mm) for labels in (prediction, reference))
    rows = {}
    for id, name in enumerate(CLASSES, start=1):
        row = {"dice": scores[name], "in_reference": bool((reference == id).any())}
        row |= surface_distances(prediction == id, reference == id, spacing_mm)
        row |= {"volume_ml": ours[name], "reference_ml": theirs[name]}
        rows[name] = {**row, "volume_error_ml": ours[name] - theirs[name]}
    return rows


def clinical(volumes: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """Clinical numbers of one subject from {phase: volume in ml of each class}; phases ED and ES. lv_edv_ml,
    lv_esv_ml, lv_sv_ml = EDV - ESV, lv_ef_percent = 100 SV / EDV, the same for rv, and lv_mass_g, the
    myocardium at ED. None for a volume that is missing or not finite, and for an EF with an EDV of 0.
    """
    numbers: dict[str, float] = {}
    for ventricle in ("LV", "RV"):
        edv, esv = (float(volumes.get(phase, {}).get(ventricle, math.nan)) for phase in ("ED", "ES"))
        ejected = 100 * (edv - esv) / edv if edv else math.nan
        found = {"edv_ml": edv, "esv_ml": esv, "sv_ml": edv - esv, "ef_percent": ejected}
        numbers |= {f"{ventricle.lower()}_{name}": value for name, value in found.items()}
    numbers["lv_mass_g"] = MYOCARDIUM_G_PER_ML * volumes.get("ED", {}).get("MYO", math.nan)
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def indexed(numbers: Mapping, height_m: float | None, weight_kg: float | None) -> dict[str, float | None]:
    """Body surface area (Du Bois and Du Bois, Arch Intern Med 17(6), 1916) in square metres, and the volumes
    and the mass in `numbers` (those of `clinical`) per square metre. None for what is not known.
    """
    area = 0.007184 * weight_kg**0.425 * (100 * height_m) ** 0.725 if height_m and weight_kg else None
    found = {"body_surface_m2": area}
    for name in ("lv_edv_ml", "lv_esv_ml", "lv_sv_ml", "rv_edv_ml", "rv_esv_ml", "rv_sv_ml", "lv_mass_g"):
        value = numbers.get(name)
        found[f"{name}_per_m2"] = None if area is None or value is None else value / area
    return found


def _distances(prediction: ndarray, reference: ndarray, spacing_mm: Sequence[float]) -> dict[str, float]:
    (box,) = find_objects((prediction | reference).view(np.uint8))  # every surface voxel lies in it
    neighbours = generate_binary_structure(3, 1)
    if len(prediction) == 1:
        neighbours[::2] = False
    ours, theirs = (mask & ~binary_erosion(mask, neighbours) for mask in (prediction[box], reference[box]))
    to_reference = distance_transform_edt(~theirs, sampling=spacing_mm)[ours]
    to_prediction = distance_transform_edt(~ours, sampling=spacing_mm)[theirs]
    return {
        "hausdorff": float(max(to_reference.max(), to_prediction.max())),
        "hd95": float(max(np.percentile(to_reference, 95), np.percentile(to_prediction, 95))),
        "assd": float((to_reference.sum() + to_prediction.sum()) / (to_reference.size + to_prediction.size)),
    }
