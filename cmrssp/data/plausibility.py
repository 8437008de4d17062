"""What a short-axis cine of a heart can be: judges geometry, time and intensities."""

from collections.abc import Iterator, Sequence

import numpy as np

from cmrssp.data.subject import CORRECTED, NOT_MEASURED, USED, Finding, listed

# SCMR's protocols ask for pixels of 1 to 2 mm and slices 6 to 10 mm apart (J Cardiovasc Magn Reson 2020,
# 22:17); ACDC, M&Ms and clinical files reach from 0.6 mm to 18 mm. The limits are somewhat wider.
PIXEL_MM, PITCH_MM = (0.4, 4.0), (3.0, 30.0)
# A newborn's heart is about 40 mm wide and 30 mm long; a scanner's bore is at most 700 mm wide. From the apex
# to the roof of the atria an enlarged heart is shorter than 200 mm, as are 20 slices of 10 mm.
FIELD_MM, STACK_MM = (40.0, 700.0), (30.0, 200.0)
HEART_RATE = (30.0, 200.0)  # a minute: an athlete asleep, a newborn awake
STEP_S = (0.005, 0.2)  # between frames: 5 ms is below any repetition time of a segment, 200 ms blurs systole
_FEWEST_FRAMES = 5  # of a whole beat: fewer are chosen phases, such as ED and ES alone
# Correlation of neighbours in 131 cines of ACDC, the phantom and a clinical one: slices 0.44 to 0.90 in the
# mean over a cine, frames 0.81 to 0.99, frames always 0.06 or more above slices.
_FEWEST_SLICES = 5  # that show a pattern
_LIKE_FRAMES, _MORE_ALIKE = 0.93, 0.1
_STRIDE = 4  # of the pixels that are compared
_COARSER = 1.5  # slices along another axis than the third are at least so many pixels thick
_SMOOTHER = 0.97  # undoing a wrap leaves at most so much of the image's roughness


def millimetres(lengths: np.ndarray, declared: float) -> tuple[float, list[Finding]]:
    """The factor to mm of voxel sizes (3,): `declared` by the header, unless another unit alone fits."""

    def fits(factor: float) -> bool:
        *pixel, pitch = np.sort(lengths * factor)
        return all(_within(side, PIXEL_MM) for side in pixel) and _within(pitch, PITCH_MM)

    factor = next((f for f in (declared, 1.0, 1000.0, 0.001) if fits(f)), declared)
    what = f"by the header's unit its voxels are {mm(lengths * declared)}: read as {mm(lengths * factor)}"
    return factor, [] if factor == declared else [(what, CORRECTED)]


def slice_axis(shape: Sequence[int], lengths: np.ndarray) -> tuple[int, list[Finding]]:
    """Which axis of a file (X, Y, Z) holds the slices: the third, unless another is shortest and coarsest."""
    axis = int(np.argmin(shape[:3]))
    coarsest = lengths[axis] >= _COARSER * np.delete(lengths, axis).max()
    if axis == 2 or shape[axis] == shape[2] or not coarsest:
        return 2, []
    found = f"the slices lie along axis {axis + 1}: {shape[axis]} of {lengths[axis]:.4g} mm"
    return axis, [(found, CORRECTED)]


def unwrapped(raw: np.ndarray) -> np.ndarray | None:
    """A signed 8- or 16-bit array (X, Y, Z, T) as unsigned if that makes it much smoother, else None."""
    if raw.dtype.kind != "i" or raw.dtype.itemsize > 2 or raw.min() >= 0:
        return None

    def roughness(array: np.ndarray) -> float:
        frame = array[..., array.shape[3] // 2].astype(np.int64)
        return float(sum(np.abs(np.diff(frame, axis=axis)).sum() for axis in (0, 1)))

    unsigned = raw.view(raw.dtype.str.replace("i", "u"))
    return unsigned if roughness(unsigned) < _SMOOTHER * roughness(raw) else None


def judge(
    cine: np.ndarray, spacing_mm: tuple[float, float], pitch_mm: float, time_step_s: float | None
) -> tuple[list[Finding], list[int], float | None]:
    """Of a canonical cine (T, Z, H, W): (what is odd; the whole frames, all if none is; beats a minute where
    the frames are one beat of plausible length).
    """
    found = list(_odd_sizes(cine.shape, spacing_mm, pitch_mm))
    flat = cine.min(axis=(2, 3)) == cine.max(axis=(2, 3))  # (T, Z): constant images
    padding = flat[~flat.all(axis=1)].all(axis=0)  # (Z,): slices that are constant in all frames
    found += _odd_slices(cine, flat, padding)
    likeness, of_slices = _likeness(cine, flat)
    if cine.shape[1] >= _FEWEST_SLICES:
        of_frames = float(np.median(np.diag(likeness, 1))) if len(cine) > 1 else 1.0
        alike = f"slices are more alike than frames (correlation {of_slices:.2f}, {of_frames:.2f})"
        if of_slices > of_frames + _MORE_ALIKE:
            found.append((f"{alike}: exchanged?", NOT_MEASURED))
        elif len(cine) == 1 and of_slices > _LIKE_FRAMES and pitch_mm >= PITCH_MM[0]:
            what = f"its slices are as alike as frames (correlation {of_slices:.2f}): is the third axis time?"
            found.append((what, NOT_MEASURED))
    whole = np.flatnonzero(~(flat & ~padding).any(axis=1)).tolist()
    if not whole:
        found.append(("no frame is whole", NOT_MEASURED))
    rate, about_time = _heart_rate(likeness, time_step_s)
    return found + about_time, whole or list(range(len(cine))), rate


def _odd_sizes(shape: Sequence[int], spacing_mm: tuple[float, float], pitch_mm: float) -> Iterator[Finding]:
    frames, slices, rows, columns = shape
    if not (all(_within(s, PIXEL_MM) for s in spacing_mm) and _within(pitch_mm, PITCH_MM)):
        sizes = mm((*spacing_mm, pitch_mm))
        yield f"a spacing of {sizes} (rows, columns, slices) is unusual for a short-axis cine", USED
    height, sides = slices * pitch_mm, (rows * spacing_mm[0], columns * spacing_mm[1])
    if not _within(height, STACK_MM):
        what = f"{slices} slices of {pitch_mm:.4g} mm make {height:.4g} mm, more or less than a heart"
        yield what + "; is the third axis time?" * (frames == 1), NOT_MEASURED
    if not all(_within(side, FIELD_MM) for side in sides):
        yield f"a field of view of {mm(sides)} is not a heart's", NOT_MEASURED
    if slices > min(rows, columns):
        yield f"{slices} slices of {rows} x {columns} pixels: is another axis the slices?", NOT_MEASURED


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def _odd_slices(cine: np.ndarray, flat: np.ndarray, padding: np.ndarray) -> Iterator[Finding]:
    """Constant frames and slices, and slices with exactly the images of another; all counted from 0."""
    empty = flat.all(axis=1)
    if empty.any():
        yield f"constant frames: {listed(np.flatnonzero(empty))} of {len(flat)}, counted from 0", USED
    if padding.any():
        inside = np.ptp(np.flatnonzero(~padding)) + 1 > np.count_nonzero(~padding)
        what = f"constant slices: {listed(np.flatnonzero(padding))} of {len(padding)}, counted from 0"
        yield (what + ", within the stack", NOT_MEASURED) if inside else (what, USED)
    frames, slices = np.nonzero(flat & ~padding & ~empty[:, None])
    if len(frames):
        what = f"slices {listed(np.unique(slices))} are constant in the frames {listed(np.unique(frames))}"
        yield f"{what}: these are not measured", USED
    marks = [hash(cine[:, z].tobytes()) for z in range(cine.shape[1])]
    twice = [z for z in np.flatnonzero(~padding) if marks[z] in marks[:z]]
    if twice:
        yield f"slices that repeat another one: {listed(twice)}", NOT_MEASURED


def _likeness(cine: np.ndarray, flat: np.ndarray) -> tuple[np.ndarray, float]:
    """Correlation of each frame with each, (T, T), averaged over the slices (constant images count as 0), and
    that of neighbouring slices, averaged over the cine without constant images.
    """
    signs = cine[:, :, ::_STRIDE, ::_STRIDE].reshape(*cine.shape[:2], -1).astype(np.float32)
    signs -= signs.mean(axis=-1, keepdims=True)
    signs /= np.maximum(np.linalg.norm(signs, axis=-1, keepdims=True), 1e-6)
    pairs = (signs[:, 1:] * signs[:, :-1]).sum(axis=-1)[~(flat[:, 1:] | flat[:, :-1])]
    table = signs.reshape(len(cine), -1)
    filled = max(1, np.count_nonzero(~flat.all(axis=0)))
    return table @ table.T / filled, float(pairs.mean()) if pairs.size else 0.0


def _heart_rate(likeness: np.ndarray, time_step_s: float | None) -> tuple[float | None, list[Finding]]:
    frames = len(likeness)
    if frames < _FEWEST_FRAMES or time_step_s is None:
        return None, []
    if period := _period(likeness):
        return None, [(f"its frames repeat every {period}: several beats? No heart rate is given", USED)]
    rate = 60 / (time_step_s * frames)
    if _within(rate, HEART_RATE):
        return rate, []
    what = f"{frames} frames of {1000 * time_step_s:.4g} ms make {rate:.0f} beats a minute"
    return None, [(what + ": no heart rate is given", USED)]


def _period(likeness: np.ndarray) -> int:
    """After how many frames a cine resembles itself as neighbours do; 0 if it never does."""
    profile = np.array([np.diag(likeness, lag).mean() for lag in range(len(likeness) // 2 + 1)])
    for lag in range(3, len(profile)):
        fall = profile[1] - profile[1:lag].min()
        is_peak = profile[lag] >= profile[lag : lag + 2].max()
        if is_peak and fall > 0.01 and profile[lag] >= profile[1] - 0.1 * fall:
            return lag
    return 0


def mm(lengths: Sequence[float]) -> str:
    return " x ".join(f"{length:.4g}" for length in lengths) + " mm"
