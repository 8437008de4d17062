"""A synthetic cine data set in the layout of M&Ms, for a first run where no data are at hand.

A subject is a beating heart in a chest, defined in mm and seen by one of four made-up scanners; nothing in it
is measured or medical. Scene coordinates: u to the patient's left, v to the back and feet, s to the apex. The
heart's contours are radii around the axis of the left ventricle (LV), tabulated over the angle.
"""

import csv
import gzip
import secrets
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.spatial.transform import Rotation

from cmrssp.hardware.device import available_cores

TABLE = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"
_COLUMNS = ("", "External code", "VendorName", "Vendor", "Centre", "ED", "ES", "Age", "Pathology", "Sex",
            "Height", "Weight")  # fmt: skip
# `blood` is an intensity; noise and the tissues after it are relative to that.
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
_TURN, _ANGLES = 2 * np.pi, (np.arange(720) + 0.5) * (np.pi / 360)
_AXES = np.array([[-2, -1, 1], [0, -1, -1], [-1, 1, -1]]).T / np.sqrt([6, 2, 3])  # u, v, s in RAS+


def write(
    folder: Path, *, num_subjects: int = 60, num_frames: int = 8, max_slices: int = 8, max_matrix: int = 224
) -> None:
    """Write the data set to `folder`, which must be absent or empty and which appears only when complete.

    A subject depends on its index and the sizes alone (frames and slices: at least 2).
    """
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.part")
    part.mkdir(parents=True)
    write_one = partial(_write_subject, part, num_frames, max_slices, max_matrix)
    try:
        # Threads: numpy, scipy and zlib give up the interpreter lock for most of the work.
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
    beat = (np.sin(np.pi * phase) ** 2).tolist()
    heart = _Heart(rng, disease)
    grid = _Grid(rng, heart.length, max_slices, max_matrix)
    scene = _Scene(rng, heart, vendor, grid)
    cine, labels = (np.empty((*grid.shape, num_frames), kind) for kind in (np.int16, np.uint8))
    for z, s in enumerate(grid.s.tolist()):
        for frame, (image, label) in enumerate(scene.frames(s, beat)):
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


def _paint(image, layers):
    """The image with each layer (depth below its surface in mm, width of its edge, level) over the last."""
    for depth, width, level in layers:
        image = image + np.clip(depth / width + 0.5, 0, 1) * (level - image)
    return image


def _waves(rng, first, last, amplitude):
    """A random smooth function of (angles, x)."""
    m = np.arange(first, last + 1)[:, None]
    size, phase, turn = rng.normal(0, amplitude / m), rng.uniform(0, _TURN, m.shape), rng.normal(size=m.shape)
    return lambda angles, x: (size * np.cos(m * angles + phase + turn * x)).sum(axis=0)


class _Heart:
    """Shape and motion. x is the place on the axis of the beating heart: 0 valves, 1 apex, below 0 atria."""

    def __init__(self, rng, disease):
        self.size = float(np.clip(rng.normal(1, 0.09), 0.8, 1.2))  # as the body's surface
        linear = self.size**0.6
        self.length = rng.uniform(88, 98) * linear
        self.radius, self.wall, self.rv_width = (rng.uniform(*span) * linear for span in disease[1:4])
        self.descent = rng.uniform(7, 12) * (0.6 if disease.name == "DCM" else 1)  # of the valves
        left = 1 - self.descent / self.length
        self.narrowing = 1 - np.sqrt((1 - rng.uniform(*disease.lv_ef)) / left)
        self.rv_narrowing = 1 - (1 - rng.uniform(*disease.rv_ef)) / left
        self.rv_end, self.rv_reach, self.fat = rng.uniform((0.7, 1.15, 0.5), (0.82, 1.45, 3.0))
        self.asymmetry = rng.uniform(0, 0.5) if disease.name == "HCM" else rng.normal(0, 0.06)
        self.septum, self.spiral, self.twist = rng.normal((np.pi + 0.25, 0.15, 0.15), (0.26, 0.15, 0.04))
        self.drift, self.pull = rng.normal([(0.06, 0.02), (-2.0, 0.5)], [(0.05,), (1.0,)]).astype(np.float32)
        self.endo_waves, self.wall_waves = _waves(rng, 2, 5, 0.09), _waves(rng, 1, 4, 0.15)
        self.rv_waves, self.fat_waves = _waves(rng, 1, 6, 0.2), _waves(rng, 1, 5, 2.0)
        rough = np.maximum(gaussian_filter1d(rng.standard_normal((2, 720)), 7, mode="wrap"), 0)
        self.rough = (rng.uniform(0.5, 1.8) * rough / rough.std()).astype(np.float32)
        self.papillary = rng.normal([(0.68, 2.7, 4.2), (0.68, 4.6, 4.2)], (0.04, 0.15, 0.5)) * (1, 1, linear)

    def contours(self, s, contraction):
        """x, the angle of the middle of the septum, and tables of radii: endo, epi, rv, outer, fat."""
        fall = contraction * self.descent
        x = (s - fall) / (self.length - fall)
        up = max(x, 0.0)
        septum = self.septum + self.spiral * x + self.twist * contraction * (x - 0.3)
        phi = (_ANGLES - septum + np.pi) % _TURN - np.pi
        taper = max(1 - (up / 0.94) ** 2.3, 0.0) ** 0.6 * (1 + 0.5 * min(x, 0))
        endo = self.radius * taper * (1 + self.endo_waves(phi, x))
        wall = self.wall * (0.75 + 0.25 * taper) * min(max(0.6 + x / 0.05, 0.2), 1)  # atria: thin
        wall = wall * (1 + self.wall_waves(phi, x) + self.asymmetry * np.exp(-((phi / 0.9) ** 2)))
        tip = max(1 - up**9, 0.0) ** 0.5
        muscle = np.maximum(((endo + np.maximum(wall, 1.5)) * tip) ** 2 - endo**2, 0)
        endo = endo * (1 - contraction * self.narrowing)
        epi = np.sqrt(endo**2 + muscle / (1 - fall / self.length))  # muscle keeps its volume
        right = max(1 - (up / self.rv_end) ** 2.2, 0.0)
        reach = self.rv_reach * (0.6 + 0.4 * right)
        bulge = (1 + self.rv_waves(phi, x)) * np.maximum(1 - (phi / reach) ** 2, 0) ** 0.75
        bulge *= self.rv_width * right**0.7 * (1 - contraction * self.rv_narrowing)
        rv = np.where(bulge > 0.5, epi + bulge, 0)  # its inner border is the septum
        outer = np.maximum(epi, np.where(rv > 0, rv + 2.5, 0))
        grooves = 5 * np.exp(-(((np.abs(phi) - reach) / 0.25) ** 2))
        fat = outer + tip * np.maximum(self.fat + grooves + self.fat_waves(phi, x), 0)
        return x, septum, np.stack([endo, epi, rv, outer, fat]).astype(np.float32)


class _Grid:
    """The voxels (columns, rows, slices from base to apex), and the order in which the files store them."""

    def __init__(self, rng, length, max_slices, max_matrix):
        atria, beyond = ((rng.random(2) < (0.3, 0.2)) & (max_slices >= 5)).tolist()
        slices = min(int(rng.integers(max(2, max_slices - 2), max_slices + 1)) + atria + beyond, max_slices)
        self.pitch = rng.uniform(0.94, 0.99) * length / (slices - atria - beyond)
        self.s = (np.arange(slices) - atria + 0.5) * self.pitch
        long = round(rng.uniform(0.85, 1) * max_matrix)
        self.spacing = min(rng.uniform(265, 355) / long, 1.8 * 224 / max_matrix)
        short = min(round(max(rng.uniform(0.7, 1) * long, 0.7 * max_matrix, 215 / self.spacing)), long)
        self.shape = (short, long, slices) if rng.random() < 0.3 else (long, short, slices)
        self.u, self.v = (  # the heart is off the image's centre
            ((np.arange(n) - (n - 1) / 2) * self.spacing + np.clip(rng.normal(0, 15), -32, 32)).astype("f4")
            for n in self.shape[:2]
        )
        self.axes = Rotation.from_rotvec(np.clip(rng.normal(0, 0.08, 3), -0.15, 0.15)).as_matrix() @ _AXES
        self.origin = rng.normal((-25, 20, 0), 20)
        self.reversed = np.flatnonzero(rng.random(3) < (0.2, 0.2, 0.5))
        self.order = (1, 0, 2, 3) if rng.random() < 0.25 else (0, 1, 2, 3)

    def stored(self, array):
        """The array (columns, rows, slices, frames) as the files store it, and the affine that says so."""
        corner = self.origin + self.axes @ (self.u[0], self.v[0], self.s[0])
        affine = nibabel.affines.from_matvec(self.axes * (self.spacing, self.spacing, self.pitch), corner)
        for axis in self.reversed:
            affine[:, 3] += affine[:, axis] * (self.shape[axis] - 1)
            affine[:, axis] *= -1
        return np.flip(array, self.reversed).transpose(self.order), affine[:, self.order]


class _Scene:
    """One subject's heart and chest, as its scanner sees them."""

    def __init__(self, rng, heart, vendor, grid):
        self.rng, self.heart, self.vendor, self.grid, self.px = rng, heart, vendor, grid, grid.spacing
        self.reach = max(heart.contours(s, 0.0)[2].max() for s in (0, 20, 40)) + 10
        self.grains = rng.standard_normal((4, 16, 16, 16)).astype(np.float32)
        varied = np.exp(rng.normal(0, 0.15, 5)).tolist()
        self.muscle = rng.uniform(0.55, 0.66) if rng.random() < 0.15 else vendor.muscle * varied[0]
        self.fat, self.liver, self.lung = vendor.fat * varied[1], vendor.liver * varied[2], 0.1 * varied[3]
        self.noise, self.rv_blood = np.float32(vendor.noise * varied[4] ** 1.5), rng.uniform(0.85, 1.05)
        self.void = rng.uniform(0.3, 0.7) if rng.random() < 0.25 else 0.0  # signal lost where blood is fast
        self.void_u, self.void_v, self.void_size = rng.normal((0, 0, 7), (10, 10, 1)).tolist()  # in the heart
        self.body = rng.normal((-22, 24, 168, 112), (6, 5, 10, 7)).tolist()  # centre and half axes
        self.skin, self.ribs, self.content = rng.uniform((7, 10, 0.3), (24, 16, 1.1)).tolist()
        self.dome, self.stomach, *self.aorta = rng.normal((70, 78, 12, 78, 12), (9, 9, 5, 5, 1.2)).tolist()
        # As bright as blood, but elsewhere: u, v, s, radius, level.
        self.vessels = rng.uniform((-100, -60, 0, 5, 0.6), (110, 100, 90, 13, 1.1), (6, 5)).tolist()

    def frames(self, s, beat):
        """(image int16, labels), each (rows, columns), of the slice at s at each contraction of `beat`."""
        u, v = np.meshgrid(self.grid.u, self.grid.v)
        breath = self.rng.normal(0, 1.5, 2).astype(np.float32)
        grain = self._grain(2, u, v, s, 9.0)
        still = self._chest(u - breath[0], v - breath[1], s, grain)
        shade = np.exp(self.vendor.shading * (0.7 * self._grain(3, u, v, s, 90.0) - v / 170))
        centre = breath + self.heart.drift * np.float32(s - 0.45 * self.heart.length) + np.float32((16, 4))
        u, v = u - centre[0], v - centre[1]
        box = tuple(slice(*np.searchsorted(at, (-self.reach, self.reach))) for at in (v[:, 0], u[0]))
        sigma = self.vendor.blur_mm / self.px
        blurred = gaussian_filter(still, sigma)
        for contraction in beat:
            image, labels = blurred.copy(), np.zeros(u.shape, np.uint8)
            part, labels[box] = self._beat(still[box], u[box], v[box], s, contraction, grain[box])
            image[box] = gaussian_filter(part, sigma)
            noise = self.rng.standard_normal((2, u.shape[0] + 1, u.shape[1] + 1), np.float32)
            noise = self.noise / 2 * (noise[:, 1:] + noise[:, :-1])
            noise = noise[:, :, 1:] + noise[:, :, :-1]  # correlated, as in an image that was interpolated
            image = np.hypot(image * shade + noise[0], noise[1]) ** self.vendor.gamma * self.vendor.blood
            yield np.rint(np.minimum(image, 32767)).astype(np.int16), labels

    def _grain(self, number, u, v, s, size):
        """Noise in space, smooth over `size` mm, of about unit variance."""
        places, nodes = (s, v[:, :1], u[0, :, None]), np.arange(16, dtype=np.float32)
        s, v, u = (np.exp(-1.4 * ((at / size - nodes + 8) % 16 - 8) ** 2) for at in places)
        # Not by BLAS, whose threads get in each other's way here.
        return np.einsum("vj,ju->vu", v @ np.tensordot(s, self.grains[number], 1), u.T.copy())

    def _chest(self, u, v, s, grain):
        """All that stands still."""
        px, x, (at_u, at_v, half_u, half_v) = self.px, s / self.heart.length, self.body
        u, v = u + 4 * self._grain(0, u, v, s, 40.0), v + 4 * self._grain(1, u, v, s, 40.0)
        skin = np.abs((u - at_u) / half_u) ** 2.5 + np.abs((v - at_v) / half_v) ** 2.5
        skin = (1 - skin**0.4) * half_v
        inner = skin - self.skin - self.ribs
        between = np.maximum(60 - np.hypot(u + 6, v / 0.75 - 8), 44 - np.hypot(u + 30, v / 2 - 15)) - 20 * x
        spine = np.minimum(20 - np.hypot(u + 34, v - 100 - 35 * x), inner + 8)
        aorta = self.aorta[2] - np.hypot(u - self.aorta[0], v - self.aorta[1] - 20 * x)
        liver = np.minimum(v - self.dome + 38 * x - ((u + 45) / 18) ** 2, inner)
        stomach = np.minimum(v - self.stomach + 38 * x - ((u - 62) / 10) ** 2, inner)
        layers = [(skin, px, self.fat),
                  (skin - self.skin, px, 0.28 + 0.12 * np.sin(u / 9 + v / 18 + s / 7)),
                  (inner, px, self.lung + 0.55 * np.clip(grain - 0.9 - 0.012 * np.hypot(u, v), 0, 1)),
                  (np.minimum(between, inner + 6), 4.0, 0.3 + self.fat * (0.3 + 0.15 * grain)),
                  (liver, px, self.liver + 0.25 * np.clip(grain - 1.1, 0, 1)), (stomach, px, 0.3),
                  (stomach - 4, px, self.content), (spine, px, 0.45), (aorta + 2, px, 0.3),
                  (aorta, px, 0.95)]  # fmt: skip
        for at_u, at_v, at_s, radius, level in self.vessels:
            depth = radius - np.hypot(np.hypot(u - at_u, v - at_v), (s - at_s) / 2)
            layers.append((np.minimum(depth, inner), px, level))
        return _paint(np.zeros_like(u), layers) * (1 + 0.07 * grain)

    def _beat(self, image, u, v, s, contraction, grain):
        """The image with the heart in it, and its labels. u and v count from the LV's axis at rest."""
        heart, px, (x, septum, tables) = self.heart, self.px, self.heart.contours(s, contraction)
        u, v = (at - pull * np.float32(contraction) for at, pull in zip((u, v), heart.pull, strict=True))
        radius, bins = np.hypot(u, v), (np.arctan2(v, u) * (720 / _TURN)).astype(np.int32) % 720
        endo, epi, rv, outer, fat = tables[:, bins] - radius
        edge = (px**2 + 16 * x**4) ** 0.5  # a thick slice blurs the slanting walls of the apex
        void = self.void * np.exp(-((np.hypot(u - self.void_u, v - self.void_v) / self.void_size) ** 2) / 2)
        muscle, blood = self.muscle * (1 + 0.06 * grain), 1 + 0.04 * grain - void
        rough = heart.rough[:, bins] * np.float32(1 - 0.4 * contraction)  # trabeculae: blood to the labels
        layers = [(fat, edge, self.fat), (outer, edge, muscle),
                  (rv - rough[0], edge, blood * self.rv_blood), (epi, edge, muscle),
                  (endo - rough[1], edge, blood)]  # fmt: skip
        # Papillary muscles, or above the valves the root of the aorta.
        thin = max(0.0, 1 - ((x - 0.52) / 0.27) ** 2) ** 0.5
        spots = heart.papillary * (1, 1, thin or -1) if x >= 0 else np.array([[1.1, 0.6, min(13, -260 * x)]])
        for share, angle, size in spots.tolist():
            far, angle = share * float(tables[0].mean()), angle + septum
            depth = size - np.hypot(u - far * float(np.cos(angle)), v - far * float(np.sin(angle)))
            layers += [(depth, px, muscle)] if x >= 0 else [(depth + 2, px, muscle), (depth, px, blood)]
        return _paint(image, layers), (x >= 0) * np.where(endo > 0, 1, np.where(epi > 0, 2, 3 * (rv > 0)))
