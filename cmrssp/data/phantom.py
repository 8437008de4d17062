"""A synthetic cine data set in the layout of M&Ms, for a first run without data at hand.

A subject is a beating heart in a chest, drawn in mm and seen by one of four made-up scanners. Coordinates: u
to the patient's left and v to the back, from the axis of the left ventricle (LV); s along that axis to the
apex. The heart's contours are radii around the axis, tabulated over the angle.
"""

import csv
import gzip
import secrets
import shutil
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from skimage.transform import resize

from cmrssp.hardware.device import available_cores

TABLE = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"
_COLUMNS = ("", "External code", "VendorName", "Vendor", "Centre", "ED", "ES", "Age", "Pathology", "Sex",
            "Height", "Weight")  # fmt: skip
# `blood` is an intensity; noise and tissues are relative to it.
_Vendor = namedtuple("_Vendor", "letter name centres blood gamma noise shading blur_mm muscle fat liver")
_VENDORS = (
    _Vendor("A", "Siemens", (1, 6), 190, 1.0, 0.035, 0.45, 0.8, 0.34, 0.85, 0.45),
    _Vendor("B", "Philips", (2, 3), 750, 0.9, 0.045, 0.25, 1.0, 0.42, 1.10, 0.40),
    _Vendor("C", "GE", (4,), 330, 1.1, 0.060, 0.50, 1.2, 0.38, 0.95, 0.55),
    _Vendor("D", "Canon", (5,), 2500, 1.2, 0.050, 0.35, 0.9, 0.50, 0.65, 0.60),
)
# In mm at end diastole: LV radius, LV wall, width of the right ventricle (RV). Then the ejection fractions.
_Disease = namedtuple("_Disease", "name radius wall rv_width lv_ef rv_ef")
_DISEASES = (
    _Disease("NOR", (23, 28), (7, 9.5), (29, 36), (0.54, 0.66), (0.38, 0.50)),
    _Disease("HCM", (21, 26), (11, 16), (27, 34), (0.58, 0.69), (0.40, 0.52)),
    _Disease("DCM", (31, 36), (7, 9), (31, 39), (0.34, 0.43), (0.26, 0.38)),
    _Disease("ARV", (23, 28), (7, 9), (40, 48), (0.48, 0.60), (0.28, 0.36)),
)
_ANGLES = (np.arange(360) + 0.5) * (np.pi / 180)
_AXES = np.array([[-2, -1, 1], [0, -1, -1], [-1, 1, -1]]).T / np.sqrt([6, 2, 3])  # u, v, s in RAS+


def write(
    folder: Path, *, num_subjects: int = 60, num_frames: int = 8, max_slices: int = 8, max_matrix: int = 224
) -> None:
    """Write the data set to `folder`, which must be absent or empty and appears when it is complete.

    A subject depends on its index and the sizes alone (frames and slices: at least 2).
    """
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.part")
    part.mkdir(parents=True)
    write_one = partial(_write_subject, part, num_frames, max_slices, max_matrix)
    try:
        with ThreadPoolExecutor(available_cores()) as pool:
            rows = list(pool.map(write_one, range(num_subjects)))
        with open(part / TABLE, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([_COLUMNS, *rows])
        try:
            part.replace(folder)
        except OSError:
            if not (folder / TABLE).is_file():  # else another process has written the same meanwhile
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_subject(folder: Path, num_frames: int, max_slices: int, max_matrix: int, index: int) -> list:
    """Write one subject's two files; return its row of the table."""
    rng = np.random.default_rng((0, index))
    vendor, disease = _VENDORS[index % 4], _DISEASES[(index + index // 4) % 4]
    ed, systole = (num_frames - 1) * (rng.random() < 0.6), max(1, round(rng.uniform(0.3, 0.45) * num_frames))
    es, rest = (ed + systole) % num_frames, num_frames - systole
    # Contraction, 0 at ED and 1 at ES, then early filling, a rest and the atrial kick.
    times = (0, systole, systole + 0.5 * rest, systole + 0.7 * rest, num_frames)
    phase = np.interp((np.arange(num_frames) - ed) % num_frames, times, (0, 0.5, 0.83, 0.86, 1))
    heart = _Heart(rng, disease)
    grid = _Grid(rng, heart.length, max_slices, max_matrix)
    scene = _Scene(rng, heart, vendor, grid)
    cine, labels = (np.empty((*grid.shape, num_frames), kind) for kind in (np.int16, np.uint8))
    for z, s in enumerate(grid.s):
        for frame, (image, label) in enumerate(scene.frames(s, np.sin(np.pi * phase) ** 2)):
            cine[:, :, z, frame], labels[:, :, z, frame] = image.T, label.T * (frame in (ed, es))
    code = (7_654_321 + index * 5_851_027) % 260**3  # the step is prime to 260: no code twice
    id = "".join(chr(ord("A") + n // 10 % 26) + str(n % 10) for n in (code, code // 260, code // 260**2))
    (folder / id).mkdir()
    step = rng.uniform(0.8, 1.0) / num_frames
    for suffix, array in (("sa", cine), ("sa_gt", labels)):
        array, affine = grid.stored(array)
        image = nibabel.Nifti1Image(array, affine)
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1)
        image.header.set_xyzt_units("mm", "sec")
        image.header.set_zooms((*image.header.get_zooms()[:3], step))
        # No time in the gzip header: the same bytes whenever they are written.
        (folder / id / f"{id}_{suffix}.nii.gz").write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))
    body = rng.normal((50, 171 * heart.size**0.4, 74 * heart.size**1.6), (11, 6, 8)).round().astype(int)
    age, height, weight = np.where(rng.random(3) < 0.1, "", body.astype(str))
    return [index, id, vendor.name, vendor.letter, rng.choice(vendor.centres), ed, es, age, disease.name,
            rng.choice(["F", "M"]), height, weight]  # fmt: skip


class _Heart:
    """Shape and motion."""

    def __init__(self, rng: np.random.Generator, disease: _Disease) -> None:
        self.size = float(np.clip(rng.normal(1, 0.09), 0.8, 1.2))  # as the body's surface
        linear = self.size**0.6
        self.length = rng.uniform(88, 98) * linear
        self.radius, self.wall, self.rv_width = (rng.uniform(*span) * linear for span in disease[1:4])
        self.descent = rng.uniform(7, 12) * (0.6 if disease.name == "DCM" else 1)  # of the valves
        left = 1 - self.descent / self.length
        self.narrowing = 1 - np.sqrt((1 - rng.uniform(*disease.lv_ef)) / left)
        self.rv_narrowing = 1 - (1 - rng.uniform(*disease.rv_ef)) / left
        self.asymmetry = rng.uniform(0, 0.5) if disease.name == "HCM" else rng.normal(0, 0.06)
        self.septum, self.spiral = rng.normal((np.pi + 0.25, 0.15), (0.26, 0.15))
        self.rv_end, self.rv_reach, self.fat = rng.uniform((0.7, 1.15, 1.5), (0.82, 1.45, 4.0))
        orders = np.arange(1, 6)[:, None]
        self.waves = [
            (orders, rng.normal(0, size / orders), rng.uniform(0, 2 * np.pi, orders.shape))
            for size in (0.06, 0.12, 0.15)
        ]

    def contours(self, s: float, contraction: float) -> tuple[float, np.ndarray]:
        """The place on the axis (0 valves, 1 apex, below 0 atria) and (4, angles) radii in mm: inside and
        outside of the LV's wall, outside of the RV (0 where it is absent), outside of the fat.
        """
        fall = contraction * self.descent
        x = (s - fall) / (self.length - fall)
        up = max(x, 0.0)
        phi = (_ANGLES - self.septum - self.spiral * x + np.pi) % (2 * np.pi) - np.pi
        endo_wave, wall_wave, rv_wave = (
            1 + (a * np.cos(m * phi + p + 2 * x)).sum(axis=0) for m, a, p in self.waves
        )
        taper = max(1 - (up / 0.94) ** 2.3, 0.0) ** 0.6
        endo = self.radius * taper * endo_wave
        wall = self.wall * (0.75 + 0.25 * taper) * (wall_wave + self.asymmetry * np.exp(-((phi / 0.9) ** 2)))
        wall *= 1 if x >= 0 else 0.3  # atria: thin
        tip = max(1 - up**9, 0.0) ** 0.5
        muscle = np.maximum(((endo + np.maximum(wall, 1.5)) * tip) ** 2 - endo**2, 0)
        endo = endo * (1 - contraction * self.narrowing)
        epi = np.sqrt(endo**2 + muscle / (1 - fall / self.length))  # muscle keeps its volume
        right = max(1 - (up / self.rv_end) ** 2.2, 0.0)
        bulge = rv_wave * np.maximum(1 - (phi / (self.rv_reach * (0.6 + 0.4 * right))) ** 2, 0) ** 0.75
        bulge *= self.rv_width * right**0.7 * (1 - contraction * self.rv_narrowing)
        rv = np.where(bulge > 0.5, epi + bulge, 0)  # its inner border is the septum
        fat = np.maximum(epi, np.where(rv > 0, rv + 2.5, 0)) + self.fat * tip
        return x, np.stack([endo, epi, rv, fat]).astype(np.float32)


class _Grid:
    """The voxels (columns, rows, slices from base to apex), and the order in which the files store them."""

    def __init__(self, rng: np.random.Generator, length: float, max_slices: int, max_matrix: int) -> None:
        atria, beyond = ((rng.random(2) < (0.3, 0.2)) & (max_slices >= 5)).tolist()
        slices = min(int(rng.integers(max(2, max_slices - 2), max_slices + 1)) + atria + beyond, max_slices)
        self.pitch = rng.uniform(0.94, 0.99) * length / (slices - atria - beyond)
        self.s = ((np.arange(slices) - atria + 0.5) * self.pitch).tolist()
        long = round(rng.uniform(0.85, 1) * max_matrix)
        self.spacing = min(rng.uniform(265, 355) / long, 1.8 * 224 / max_matrix)
        short = min(round(max(rng.uniform(0.7, 1) * long, 0.7 * max_matrix, 215 / self.spacing)), long)
        self.shape = (short, long, slices) if rng.random() < 0.3 else (long, short, slices)
        off = np.clip(rng.normal(0, 15, 2), -32, 32)  # of the heart from the image's centre
        middle = [(np.arange(n) - (n - 1) / 2) * self.spacing for n in self.shape[:2]]
        self.u, self.v = middle[0] + off[0], middle[1] + off[1]
        self.axes = Rotation.from_rotvec(np.clip(rng.normal(0, 0.08, 3), -0.15, 0.15)).as_matrix() @ _AXES
        self.origin = rng.normal((-25, 20, 0), 20)
        self.reversed = np.flatnonzero(rng.random(3) < (0.2, 0.2, 0.5))
        self.order = (1, 0, 2, 3) if rng.random() < 0.25 else (0, 1, 2, 3)

    def stored(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The array (columns, rows, slices, frames) as the files store it, and the affine that says so."""
        corner = self.origin + self.axes @ (self.u[0], self.v[0], self.s[0])
        affine = nibabel.affines.from_matvec(self.axes * (self.spacing, self.spacing, self.pitch), corner)
        for axis in self.reversed:
            affine[:, 3] += affine[:, axis] * (self.shape[axis] - 1)
            affine[:, axis] *= -1
        return np.flip(array, self.reversed).transpose(self.order), affine[:, self.order]


class _Scene:
    """One subject's heart and chest, as its scanner sees them."""

    def __init__(self, rng: np.random.Generator, heart: _Heart, vendor: _Vendor, grid: _Grid) -> None:
        self.rng, self.heart, self.vendor, self.px = rng, heart, vendor, grid.spacing
        self.u, self.v = np.meshgrid(grid.u.astype(np.float32), grid.v.astype(np.float32))
        varied = np.exp(rng.normal(0, 0.15, 3))
        self.muscle, self.fat, self.liver = varied * (vendor.muscle, vendor.fat, vendor.liver)
        self.body = rng.normal((-22, 24, 168, 112), (6, 5, 10, 7))  # centre and half axes
        self.skin, self.dome, self.aorta = rng.uniform((7, 55, 72), (24, 85, 84))
        # As bright as blood, but elsewhere: u, v, radius, level.
        self.vessels = rng.uniform((-100, -60, 4, 0.6), (110, 100, 11, 1.1), (6, 4))

    def frames(self, s: float, beat: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(image int16, labels), each (rows, columns), of the slice at s at each contraction of `beat`."""
        breath = self.rng.normal(0, 1.5, 2).tolist()
        u, v = self.u - breath[0], self.v - breath[1]
        grain = self._smooth_noise(9)
        chest = self._paint(np.zeros_like(u), self._chest(u, v, grain))
        shade = np.exp(self.vendor.shading * (0.7 * self._smooth_noise(90) - v / 170))
        radius, angle = np.hypot(u, v), (np.arctan2(v, u) * (180 / np.pi)).astype(int) % 360
        papillary = self.rng.normal([(0.68, 2.7, 4.2), (0.68, 4.6, 4.2)], (0.04, 0.15, 0.5))
        for contraction in beat.tolist():
            x, contours = self.heart.contours(s, contraction)
            endo, epi, rv, fat = contours[:, angle] - radius
            muscle = self.muscle * (1 + 0.06 * grain)
            layers = [(fat, self.fat), (np.maximum(epi, rv + 2.5 * (rv > -radius)), muscle), (rv, 0.95)]
            layers += [(epi, muscle), (endo, 1 + 0.04 * grain)]
            for part, turn, size in papillary if 0.25 < x < 0.75 else ():
                at = part * contours[0].mean() * np.array([np.cos(turn), np.sin(turn)])
                layers.append((size - np.hypot(u - at[0], v - at[1]), muscle))
            image = gaussian_filter(self._paint(chest, layers) * shade, self.vendor.blur_mm / self.px)
            noise = self.rng.standard_normal((2, *u.shape), np.float32) * (2.1 * self.vendor.noise)
            noise = gaussian_filter(noise, (0, 0.6, 0.6))  # correlated, as in an image that was interpolated
            image = np.hypot(image + noise[0], noise[1]) ** self.vendor.gamma * self.vendor.blood
            labels = (x >= 0) * np.where(endo > 0, 1, np.where(epi > 0, 2, 3 * (rv > 0)))
            yield np.rint(np.minimum(image, 32767)).astype(np.int16), labels.astype(np.uint8)

    def _paint(self, image: np.ndarray, layers: list) -> np.ndarray:
        """The image with each layer (depth below its surface in mm, level) over the last."""
        for depth, level in layers:
            image = image + np.clip(depth / self.px + 0.5, 0, 1) * (level - image)
        return image

    def _smooth_noise(self, size_mm: float) -> np.ndarray:
        """Noise of about unit variance, smooth over `size_mm`."""
        nodes = [max(2, round(n * self.px / size_mm)) for n in self.u.shape]
        return 1.5 * resize(self.rng.standard_normal(nodes, np.float32), self.u.shape, order=3)

    def _chest(self, u: np.ndarray, v: np.ndarray, grain: np.ndarray) -> list[tuple]:
        """The layers of all that stands still."""
        at_u, at_v, half_u, half_v = self.body
        skin = half_v * (1 - np.hypot((u - at_u) / half_u, (v - at_v) / half_v))
        inner = skin - self.skin - 13
        around = np.minimum(60 - np.hypot(u + 6, v / 0.75 - 8), inner + 6)
        layers = [
            (skin, self.fat),
            (skin - self.skin, 0.28 + 0.12 * np.sin(u / 9 + v / 18)),
            (inner, 0.1 + 0.4 * np.clip(grain - 1, 0, 1)),
            (around, 0.3 + self.fat * (0.3 + 0.08 * grain)),
            (np.minimum(v - self.dome - ((u + 45) / 18) ** 2, inner), self.liver * (1 + 0.1 * grain)),
            (np.minimum(20 - np.hypot(u + 34, v - 115), inner + 8), 0.45),
            (12 - np.hypot(u - 12, v - self.aorta), 0.95),
        ]
        for at_u, at_v, radius, level in self.vessels.tolist():
            layers.append((np.minimum(radius - np.hypot(u - at_u, v - at_v), inner), level))
        return layers
