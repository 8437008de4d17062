"""What a cine of a heart can be, each limit and each verdict with values worked out by hand."""

import nibabel
import numpy as np
import pytest

from cmrssp.data import plausibility
from cmrssp.data.cine import read_cine
from cmrssp.data.nifti import time_step
from cmrssp.data.subject import CORRECTED, NOT_MEASURED, USED, Subject

SHAPE = (32, 40, 6, 8)  # columns, rows, slices, frames of the sound cine: 48 x 60 mm, 60 mm high
AFFINE = np.diag([1.5, 1.5, 10.0, 1.0])


def beating(beats: int = 1, frames: int = SHAPE[3]) -> np.ndarray:
    """(X, Y, Z, T) int16: in every slice another texture, and a disc that shrinks and grows `beats` times."""
    rng = np.random.default_rng(0)
    x, y, z, t = np.meshgrid(*map(np.arange, (*SHAPE[:3], frames)), indexing="ij", sparse=True)
    radius = 9 + 4 * np.cos(2 * np.pi * beats * t / frames) - z
    disc = np.clip(radius - np.hypot(x - 16, y - 20), 0, 1)
    texture = np.kron(rng.integers(0, 200, (8, 10, SHAPE[2])), np.ones((4, 4, 1)))
    return np.round(texture[..., None] + 150 * disc + rng.normal(0, 3, disc.shape) + 20).astype(np.int16)


@pytest.fixture
def read(tmp_path):
    """read(array, affine, step, unit) -> (cine, [(what, done)])."""

    def write_and_read(array, affine=AFFINE, step=0.1, units=("mm", "sec")):
        image = nibabel.Nifti1Image(array, affine)
        image.header.set_xyzt_units(*units)
        if array.ndim > 3:
            image.header.set_zooms((*image.header.get_zooms()[:3], step, *[1] * (array.ndim - 4)))
        nibabel.save(image, tmp_path / "a.nii.gz")
        cine = read_cine(Subject("folder", "a", tmp_path / "a.nii.gz"))
        return cine, [(problem.what, problem.done) for problem in cine.problems]

    return write_and_read


def done(problems) -> set[str]:
    return {what for _, what in problems}


def test_a_sound_cine_has_no_finding(read):
    cine, problems = read(beating())
    assert problems == [] and cine.measurable
    assert cine.sound_frames == tuple(range(8))
    assert cine.heart_rate_per_min == pytest.approx(60 / (8 * 0.1), rel=1e-6)


@pytest.mark.parametrize(
    ("step", "unit", "seconds", "odd"),
    [
        (34.5, "msec", 0.0345, False),
        (0.0345, "sec", 0.0345, False),
        (34.5, "sec", 0.0345, True),
        (34500, "usec", 0.0345, False),
        (1.0, "sec", None, False),
        (0.0, "sec", None, False),
        (3.0, "sec", None, True),
    ],
)
def test_time_step(step, unit, seconds, odd):
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2, 3), np.int16), np.eye(4))
    image.header.set_zooms((1, 1, 8, step))
    image.header.set_xyzt_units("mm", unit)
    found, findings = time_step(image)
    assert found == (seconds and pytest.approx(seconds)) and bool(findings) == odd


@pytest.mark.parametrize(("step", "rate"), [(0.15, 50), (0.03, None), (0.19, 39.47), (0.04, 187.5)])
def test_heart_rates_outside_30_to_200_are_not_given(read, step, rate):
    """8 frames: 60 / (8 * step)."""
    cine, problems = read(beating(), step=step)
    assert cine.heart_rate_per_min == (rate and pytest.approx(rate, abs=0.01))
    assert (USED in done(problems)) == (rate is None) and cine.measurable


def test_several_beats_give_no_heart_rate(read):
    """3 beats of 8 frames in 2.4 s: one beat of that length would be 25 a minute, of two thirds 37."""
    cine, problems = read(beating(beats=3, frames=24), step=0.06)
    assert cine.heart_rate_per_min is None and cine.measurable
    assert any("repeat every 8" in what for what, _ in problems)


def test_one_slice_over_time_as_a_3d_file(read):
    """Frames of one slice, noise aside alike: no stack of slices is."""
    cine, problems = read(beating(frames=16)[:, :, 0])
    assert not cine.measurable and any("time" in what for what, _ in problems)


def test_slices_and_frames_exchanged(read):
    cine, problems = read(np.swapaxes(beating(), 2, 3))
    assert not cine.measurable and any("exchanged" in what for what, _ in problems)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_axis_of_the_slices_is_recognised(read, axis):
    order = [0, 1]
    order.insert(axis, 2)
    moved = beating().transpose(*order, 3)
    cine, problems = read(moved, AFFINE[:, [*order, 3]])
    assert sorted(cine.stored.shape) == [6, 8, 32, 40] and cine.stored.shape[:2] == (8, 6)
    assert cine.geometry.slice_pitch_mm == 10 and cine.geometry.spacing_mm == (1.5, 1.5)
    assert done(problems) == {CORRECTED} and cine.measurable
    back = cine.geometry.from_canonical(cine.stored)
    assert (back == moved - moved.min()).all()


def test_slices_on_another_axis_than_the_spacing_says(read):
    cine, _ = read(np.moveaxis(beating(), 2, 0))
    assert not cine.measurable


def test_a_slice_that_is_there_twice(read):
    array = beating()
    array[:, :, 4] = array[:, :, 3]
    cine, problems = read(array)
    assert not cine.measurable
    ((what, _),) = problems
    assert "4" in what


@pytest.mark.parametrize(
    ("scale", "unit", "expected"),
    [(1000, "micron", set()), (1e-3, "meter", set()), (1e-3, "mm", {CORRECTED}), (1, "meter", {CORRECTED})],
)
def test_units_of_length(read, scale, unit, expected):
    """The volume of a voxel stays 1.5 * 1.5 * 10 mm3, whatever the unit."""
    cine, problems = read(beating(), np.diag([scale, scale, scale, 1]) @ AFFINE, units=(unit, "sec"))
    assert (*cine.geometry.spacing_mm, cine.geometry.slice_pitch_mm) == pytest.approx((1.5, 1.5, 10))
    assert done(problems) == expected and cine.measurable


@pytest.mark.parametrize(
    ("spacing", "measurable"),
    [
        ((1.5, 1.5, 5.0), True),  # 30 mm high
        ((1.5, 1.5, 4.5), False),  # 27 mm
        ((1.5, 1.5, 30.0), True),  # 180 mm
        ((1.5, 1.5, 34.0), False),  # 204 mm
        ((1.2, 1.5, 10.0), False),  # 38 mm wide
        ((4.0, 18.0, 20.0), False),  # 720 mm
    ],
)
def test_heights_and_fields_of_view_that_a_heart_can_have(read, spacing, measurable):
    assert read(beating(), np.diag([*spacing, 1.0]))[0].measurable == measurable


def test_a_trailing_axis_of_one(read):
    cine, problems = read(beating()[..., None])
    assert cine.stored.shape == (8, 6, 40, 32) and problems == []


def test_unsigned_values_written_as_signed(read):
    """Up to 41140: what lies above 32767 is undone, and the proportions are those of the unsigned image."""
    array = (beating().astype(np.int64) * 110).astype(np.uint16)
    assert array.max() > 35000
    cine, problems = read(array.view(np.int16))
    assert done(problems) == {CORRECTED} and cine.measurable
    back = cine.geometry.from_canonical(cine.stored) / cine.scale + cine.minimum
    assert np.abs(back - array).max() <= 0.5 / cine.scale + 1e-6


def test_signed_values_stay_signed(read):
    cine, problems = read(beating() - 60)
    assert problems == [] and cine.minimum < 0


def test_a_constant_frame_is_not_sound(read):
    array = beating()
    array[..., 7] = 0
    cine, problems = read(array)
    assert cine.sound_frames == tuple(range(7)) and cine.measurable
    assert done(problems) == {USED}
    shorter, _ = read(array[..., :7])
    assert cine.centre == pytest.approx(shorter.centre, abs=1e-3)  # what went blank has not moved
    np.testing.assert_allclose(cine.motion, shorter.motion, atol=0.01)


def test_frames_without_one_slice_are_not_sound(read):
    array = beating()
    array[:, :, 2, 4:] = 0
    cine, problems = read(array)
    assert cine.sound_frames == (0, 1, 2, 3) and cine.measurable
    assert any("frames 4, 5, 6, 7" in what for what, _ in problems)


@pytest.mark.parametrize(("slices", "measurable"), [([5], True), ([0, 1], True), ([3], False)])
def test_constant_slices(read, slices, measurable):
    """At the end of a stack they hold no heart; within it a part of the heart is missing."""
    array = beating()
    array[:, :, slices] = 0
    cine, problems = read(array)
    assert cine.measurable == measurable and cine.sound_frames == tuple(range(8))
    assert done(problems) == {USED if measurable else NOT_MEASURED}


def test_a_cine_without_a_whole_frame_is_not_measured(read):
    array = beating()
    for frame in range(8):
        array[:, :, frame % 6, frame] = 0
    cine, _ = read(array)
    assert not cine.measurable and cine.sound_frames == tuple(range(8))


def test_the_slice_axis_stays_the_third_where_another_one_is_short_but_fine():
    assert plausibility.slice_axis((6, 40, 8), np.array([1.5, 1.5, 10.0]))[0] == 2


def test_cores_are_those_that_the_process_may_use():
    import os

    from cmrssp.hardware.device import available_cores

    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
