"""A synthetic cine data set in the layout of M&Ms, for a first run without data at hand.

A subject is a beating heart in a chest, drawn in mm and seen by one of four made-up scanners; nothing in it
is measured. Coordinates: u to the patient's left and v to the back, from the axis of the left ventricle (LV);
s along that axis to the apex.
"""

import csv
import gzip
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from cmrssp.hardware.device import available_cores

TABLE = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"
_COLUMNS = ("External code", "VendorName", "Vendor", "Centre", "ED", "ES", "Pathology")
# `blood` is an intensity; noise and tissues are relative to it.
_Vendor = namedtuple("_Vendor", "letter name centre blood gamma noise shading blur_mm muscle fat liver")
_VENDORS = (
    _Vendor("A", "Siemens", 1, 190, 1.0, 0.035, 0.45, 0.8, 0.34, 0.85, 0.45),
    _Vendor("B", "Philips", 2, 750, 0.9, 0.045, 0.25, 1.0, 0.42, 1.10, 0.40),
    _Vendor("C", "GE", 4, 330, 1.1, 0.060, 0.50, 1.2, 0.38, 0.95, 0.55),
    _Vendor("D", "Canon", 5, 2500, 1.2, 0.050, 0.35, 0.9, 0.50, 0.65, 0.60),
)
# In mm at end diastole: LV radius, LV wall, width of the right ventricle (RV). Then the ejection fractions.
_DISEASES = {
    "NOR": ((23, 28), (7, 9.5), (29, 36), (0.54, 0.66), (0.38, 0.50)),
    "HCM": ((21, 26), (11, 16), (27, 34), (0.58, 0.69), (0.40, 0.52)),
    "DCM": ((31, 36), (7, 9), (31, 39), (0.34, 0.43), (0.26, 0.38)),
    "ARV": ((23, 28), (7, 9), (40, 48), (0.48, 0.60), (0.28, 0.36)),
}
_AXES = np.array([[-2, -1, 1], [0, -1, -1], [-1, 1, -1]]).T / np.sqrt([6, 2, 3])  # u, v, s in RAS+


def write(
    folder: Path, *, num_subjects: int = 60, num_frames: int = 8, max_slices: int = 8, max_matrix: int = 224
) -> None:
    """Write the data set to `folder`, which must be absent or empty and appears when it is complete.
    A subject depends on its index and the sizes alone (frames and slices: at least 2).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        (part := Path(temporary) / "part").mkdir()
        write_one = partial(_write_subject, part, num_frames, max_slices, max_matrix)
        with ThreadPoolExecutor(available_cores()) as pool:
            rows = list(pool.map(write_one, range(num_subjects)))
        with open(part / TABLE, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([_COLUMNS, *rows])
        with suppress(OSError):  # another process has written the same meanwhile
            part.replace(folder)


def _write_subject(folder: Path, num_frames: int, max_slices: int, max_matrix: int, index: int) -> list:
    """Write one subject's two files; return its row of the table."""
    rng = np.random.default_rng((0, index))
    vendor, disease = _VENDORS[index % 4], list(_DISEASES)[(index + index // 4) % 4]
    heart = _Heart(rng, *_DISEASES[disease])
    ed, systole = (num_frames - 1) * (index % 5 > 1), max(1, round(rng.uniform(0.3, 0.45) * num_frames))
    beat = np.interp((np.arange(num_frames) - ed) % num_frames, (0, systole, num_frames), (0, 0.5, 1))
    contraction = np.sin(np.pi * beat) ** 2  # 0 at ED, 1 at ES
    slices = int(rng.integers(max(2, max_slices - 2), max_slices + 1))
    long = round(rng.uniform(0.85, 1) * max_matrix)
    spacing = min(rng.uniform(265, 355) / long, 1.8 * 224 / max_matrix)
    short = min(round(max(rng.uniform(0.7, 1) * long, 215 / spacing)), long)
    columns, rows = (short, long) if rng.random() < 0.3 else (long, short)
    off = np.clip(rng.normal(0, 15, 2), -32, 32)  # of the heart from the image's centre
    u, v = ((np.arange(n) - (n - 1) / 2) * spacing + o for n, o in zip((columns, rows), off, strict=True))
    pitch = rng.uniform(0.94, 1.05) * heart.length / slices
    s = (np.arange(slices) + 0.5) * pitch
    axes = Rotation.from_rotvec(np.clip(rng.normal(0, 0.08, 3), -0.15, 0.15)).as_matrix() @ _AXES
    corner = rng.normal((-25, 20, 0), 20) + axes @ (u[0], v[0], s[0])
    affine = nibabel.affines.from_matvec(axes * (spacing, spacing, pitch), corner)
    u, v = (at.astype(np.float32) for at in np.meshgrid(u, v))
    scene = _images(rng, heart, vendor, u, v, s, spacing, contraction)
    cine, labels = (
        np.stack(arrays).reshape(slices, num_frames, rows, columns) for arrays in zip(*scene, strict=True)
    )
    es = (ed + systole) % num_frames
    labels[:, [t not in (ed, es) for t in range(num_frames)]] = 0
    id = f"P{index:03d}"
    (folder / id).mkdir()
    for suffix, array in (("sa", cine), ("sa_gt", labels)):
        image = nibabel.Nifti1Image(array.transpose(3, 2, 0, 1), affine)
        image.set_qform(affine, code=1)
        image.header.set_xyzt_units("mm", "sec")
        image.header.set_zooms((*image.header.get_zooms()[:3], 0.9 / num_frames))
        # No time in the gzip header: the same bytes whenever they are written.
        (folder / id / f"{id}_{suffix}.nii.gz").write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))
    return [id, vendor.name, vendor.letter, vendor.centre, ed, es, disease]


class _Heart:
    """Shape and motion, in mm."""

    def __init__(self, rng: np.random.Generator, radius, wall, rv_width, lv_ef, rv_ef) -> None:
        size = float(np.clip(rng.normal(1, 0.05), 0.88, 1.12))
        self.length, self.descent = rng.uniform(88, 98) * size, rng.uniform(7, 12)  # of the valves
        self.radius, self.wall, self.rv_width = (
            rng.uniform(*span) * size for span in (radius, wall, rv_width)
        )
        left = 1 - self.descent / self.length
        self.narrowing = 1 - np.sqrt((1 - rng.uniform(*lv_ef)) / left)
        self.rv_narrowing = 1 - (1 - rng.uniform(*rv_ef)) / left
        self.septum, self.stretch = np.pi + rng.normal(0.25, 0.26), rng.uniform(0.9, 1.1)
        self.rv_end = rng.uniform(0.7, 0.85)  # where on the axis the RV ends

    def depths(self, u: np.ndarray, v: np.ndarray, s: float, contraction: float) -> tuple:
        """The place on the axis (0 valves, 1 apex), and each point's depth (0 at the border) in the LV's
        cavity, in the LV with its wall, in the RV.
        """
        fall = contraction * self.descent
        x = (s - fall) / (self.length - fall)
        up = min(max(x, 0), 1)
        taper = max(1 - (up / 0.94) ** 2.3, 0) ** 0.6
        endo = self.radius * taper
        wall = self.wall * (0.75 + 0.25 * taper) * (1 - up**9) ** 0.5
        muscle = ((endo + wall) ** 2 - endo**2) / (1 - fall / self.length)  # it keeps its volume
        endo *= 1 - contraction * self.narrowing
        epi = np.sqrt(endo**2 + muscle)
        width = self.rv_width * max(1 - (up / self.rv_end) ** 2.2, 0) ** 0.7
        width *= 1 - contraction * self.rv_narrowing
        rv = 0.9 * epi + 0.2 * width  # a disc behind the LV's
        at = epi + width - rv
        radius = np.hypot(u * self.stretch, v / self.stretch)
        beside = np.hypot(u - at * np.cos(self.septum), v - at * np.sin(self.septum))
        return x, endo - radius, epi - radius, np.minimum(rv - beside, radius - epi) if width > 2 else -radius


def _images(rng, heart, vendor, u, v, s, pixel_mm, beat) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(image int16, labels uint8), each (rows, columns), for each s and each contraction of `beat`."""
    muscle, fat, liver = np.exp(rng.normal(0, 0.15, 3)) * (vendor.muscle, vendor.fat, vendor.liver)
    at_u, at_v, half_u, half_v = rng.normal(
        (-22, 24, 168, 112), (6, 5, 10, 7)
    )  # the body's centre, half axes
    rim, dome, aorta = rng.uniform((20, 55, 72), (37, 85, 84))
    skin = half_v * (1 - np.hypot((u - at_u) / half_u, (v - at_v) / half_v))
    inner = skin - rim
    chest = [
        (skin, fat),
        (skin - 0.4 * rim, 0.3),
        (inner, 0.1),  # lungs
        (np.minimum(60 - np.hypot(u + 6, v / 0.75 - 8), inner + 6), 0.3 + 0.3 * fat),
        (np.minimum(v - dome - ((u + 45) / 18) ** 2, inner), liver),
        (np.minimum(20 - np.hypot(u + 34, v - 115), inner + 8), 0.45),  # spine
        (12 - np.hypot(u - 12, v - aorta), 0.95),
    ]
    for x, y, radius, level in rng.uniform((-100, -60, 4, 0.6), (110, 100, 11, 1.1), (6, 4)):  # vessels
        chest.append((np.minimum(radius - np.hypot(u - x, v - y), inner), level))
    still = _painted(np.zeros_like(u), chest, pixel_mm)
    shade = np.exp(-vendor.shading * (v + rng.normal(0, 0.5) * u) / 170) * vendor.blood
    for at in s:
        grain = gaussian_filter(rng.standard_normal(u.shape, np.float32), 4 / pixel_mm)
        breath = rng.normal(0, 1.5, 2)
        for contraction in beat:
            x, endo, epi, rv = heart.depths(u - breath[0], v - breath[1], at, contraction)
            layers = [(np.maximum(epi, rv) + 4, fat), (np.maximum(epi, rv + 2.5), muscle)]
            layers += [(rv, 0.95), (epi, muscle), (endo, 1.0)]
            image = _painted(still, layers if x < 1 else [], pixel_mm) * (1 + 0.06 * grain / grain.std())
            image = gaussian_filter(image, vendor.blur_mm / pixel_mm)
            noise = rng.standard_normal((2, *u.shape), np.float32) * vendor.noise
            image = np.hypot(image + noise[0], noise[1]) ** vendor.gamma * shade
            labels = (x >= 0) * np.where(endo > 0, 1, np.where(epi > 0, 2, 3 * (rv > 0)))
            yield np.rint(np.minimum(image, 32767)).astype(np.int16), labels.astype(np.uint8)


def _painted(image: np.ndarray, layers: list[tuple[np.ndarray, float]], pixel_mm: float) -> np.ndarray:
    """The image with each layer (depth below its surface in mm, level) over the last."""
    for depth, level in layers:
        image = image + np.clip(depth / pixel_mm + 0.5, 0, 1) * (level - image)
    return image
