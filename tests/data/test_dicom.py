"""Folders of DICOM: the cine that is found, its voxels, affine and time. Expected values come from the arrays
that were written, from dcm2niix (golden_dicom.json) and by hand.
"""

import json
from collections import Counter
from pathlib import Path

import golden_dicom
import nibabel
import numpy as np
import pytest
import torch
from dicom_files import RR, dataset, enhanced, expected_affine, images, stack, write
from skimage.draw import polygon2mask
from test_prediction import network

from cmrssp.data import dataset as data
from cmrssp.data.cine import read_cine
from cmrssp.data.nifti import cine_image, write_labels
from cmrssp.data.subject import Subject
from cmrssp.evaluation import prediction

GOLDEN = json.loads(Path(__file__).with_name("golden_dicom.json").read_text())
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "sunnybrook"
sunnybrook = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")


def found(folder: Path, count: int = 1):
    """(the only subject, notes on its assembly, {what was left out: why})."""
    subjects, problems = data.find([str(folder)], folder.parent / "cache")
    assert len(subjects) == count
    left = {problem.file: problem.what for problem in problems if problem.done == "left out"}
    return (subjects[0], [what for what, _ in subjects[0].source.notes], left) if count == 1 else subjects


def voxels(subject) -> np.ndarray:
    """(slices, frames, rows, columns), as they are written here."""
    return np.asanyarray(cine_image(subject).dataobj)[:, ::-1].transpose(2, 3, 1, 0)


def reading(tmp_path: Path, files: list):
    write(tmp_path / "study", files)
    return found(tmp_path / "study")


@pytest.mark.parametrize("name", golden_dicom.NAMES)
def test_the_axes_are_those_of_dcm2niix(tmp_path, name):
    subject, notes, left = reading(tmp_path, golden_dicom.variant(name))
    image = cine_image(subject)
    assert list(image.shape) == GOLDEN[name]["shape"]
    assert np.allclose(image.affine, GOLDEN[name]["affine"], atol=1e-3)
    column, row = (size // 2 for size in image.shape[:2])
    assert np.asanyarray(image.dataobj)[column, row, :, 0].tolist() == GOLDEN[name]["middle"]
    assert not notes and not left


@sunnybrook
@pytest.mark.parametrize("name", ["SCD0000101", "SCD0000301"])
def test_real_affines_are_those_of_dcm2niix(tmp_path, name):
    (subject,), problems = data.find([str(SHARED / name)], tmp_path)
    image = cine_image(subject)
    assert not problems[1:]
    assert subject.id == name and subject.vendor == "GE" and list(image.shape) == GOLDEN[name]["shape"]
    assert np.allclose(image.affine, GOLDEN[name]["affine"], rtol=0, atol=1e-3)
    column, row = (size // 2 for size in image.shape[:2])
    assert np.asanyarray(image.dataobj)[column, row, :, 0].tolist() == GOLDEN[name]["middle"]


@sunnybrook
def test_real_time_comes_from_the_triggers_and_the_rr_interval(tmp_path):
    """Medians over the slices, by hand: intervals of 731-800 ms in 12 slices, 923 ms in all 10."""
    subjects, _ = data.find([str(SHARED)], tmp_path)
    assert [s.source.step_s for s in subjects] == pytest.approx([0.0379747, 0.0461053], abs=1e-6)
    assert [s.source.heart_rate_per_min for s in subjects] == pytest.approx([60000 / 759, 60000 / 923])
    assert [read_cine(s).time_step_s for s in subjects] == pytest.approx([0.0379747, 0.0461053], abs=1e-6)


@pytest.mark.parametrize("by", ["trigger", "temporal", "instance"])
def test_frames_in_the_order_of_time(tmp_path, by):
    """Each of the others says something else."""
    cine, files = images(), stack(images())
    for number, file in enumerate(files):
        t, back = number % 10, 49 - number
        file.InstanceNumber = number + 1 if by == "instance" else back + 1
        if by != "trigger":
            file.TriggerTime = None
        if by != "instance":
            file.TemporalPositionIdentifier = t + 1 if by == "temporal" else 10 - t
    subject, notes, _ = reading(tmp_path, files)
    assert (voxels(subject) == cine).all() and not notes


def test_one_series_a_slice(tmp_path):
    files = stack(images())
    for number, file in enumerate(files):
        file.SeriesInstanceUID, file.SeriesNumber = f"1.2.{number // 10}", 20 - number // 10
        file.InstanceNumber = number % 10 + 1
    subject, notes, left = reading(tmp_path, files)
    assert (voxels(subject) == images()).all() and not notes and not left
    assert np.allclose(cine_image(subject).affine, expected_affine(), atol=1e-3)


def test_enhanced_multi_frame(tmp_path):
    subject, notes, left = reading(tmp_path, [enhanced(images())])
    assert (voxels(subject) == images()).all() and not notes and not left
    assert np.allclose(cine_image(subject).affine, expected_affine(), atol=1e-3)
    assert subject.source.step_s == pytest.approx(RR / 10 / 1000)
    assert subject.source.heart_rate_per_min == pytest.approx(60000 / RR)


def test_orientations_that_differ_in_the_last_digits_and_positions_too(tmp_path):
    files = stack(images())
    for number, file in enumerate(files):
        nudge = 1e-6 * (number % 3)
        file.ImageOrientationPatient = [f"{float(v) + nudge:.7f}" for v in file.ImageOrientationPatient]
        file.ImagePositionPatient = [f"{float(v) + 100 * nudge:.6f}" for v in file.ImagePositionPatient]
    subject, notes, _ = reading(tmp_path, files)
    assert (voxels(subject) == images()).all() and not notes


@pytest.mark.parametrize("same_series", [False, True])
def test_the_later_scan_of_a_slice_counts(tmp_path, same_series):
    """The second scan has another heart rate; in the same series the instance numbers go on."""
    cine, again = images(), images()[2:3] + 1
    later = stack(again, first=2, AcquisitionTime="110000.0", NominalInterval=int(RR) - 50)
    for t, file in enumerate(later):
        file.TriggerTime, file.InstanceNumber = (RR - 50) / 10 * t + 3, 51 + t
        if not same_series:
            file.SeriesInstanceUID, file.SeriesNumber = "1.2.9", 9
    subject, (note,), _ = reading(tmp_path, stack(cine) + later)
    cine[2] = again[0]
    assert (voxels(subject) == cine).all() and "slice 2" in note


def test_other_numbers_of_frames_are_brought_to_the_commonest_by_phase(tmp_path):
    """Slice 1 has 20 frames: of them every second is used. Slice 3 lacks its frame 4, whose place the nearest
    takes."""
    cine, fine = images(), images(frames=20)
    dense = [file for number, file in enumerate(stack(fine)) if number // 20 == 1]
    files = [file for number, file in enumerate(stack(cine)) if number // 10 != 1 and number != 34]
    subject, notes, _ = reading(tmp_path, files + dense)
    expected = cine.copy()
    expected[1] = fine[1, ::2]
    expected[3, 4] = cine[3, 3]
    assert (voxels(subject) == expected).all()
    assert "slice 1 (from 0) has 20" in notes[0] and "slice 3 (from 0) has 9" in notes[1]
    assert [done for _, done in subject.source.notes] == ["used with correction"] * 2


def test_a_slice_that_is_missing_is_reported(tmp_path):
    files = [f for number, f in enumerate(stack(images())) if number // 10 != 2]
    subject, (note,), _ = reading(tmp_path, files)
    assert voxels(subject).shape[:2] == (4, 10) and "a slice seems to be missing" in note


def test_a_slice_that_is_not_parallel_is_left_out(tmp_path):
    files = stack(images())
    angle = np.deg2rad(6)
    for file in files[40:]:
        row, column = np.array(file.ImageOrientationPatient, float).reshape(2, 3)
        column = np.cos(angle) * column + np.sin(angle) * np.cross(row, column)
        file.ImageOrientationPatient = [f"{v:.7f}" for v in (*row, *column)]
        file.SeriesNumber, file.SeriesInstanceUID = 7, "1.2.7"
    subject, _, left = reading(tmp_path, files)
    assert (voxels(subject) == images()[:4]).all() and "6.0 degrees" in left["series 7"]


def test_public_scaling_of_each_slice(tmp_path):
    files = stack(images())
    for number, file in enumerate(files):
        file.RescaleSlope, file.RescaleIntercept = 1 + number // 10 / 4, -3
    subject, _, _ = reading(tmp_path, files)
    assert np.allclose(voxels(subject), images() * (1 + np.arange(5) / 4)[:, None, None, None] - 3)


def test_philips_private_scaling_where_the_public_is_absent(tmp_path):
    """Chenevert et al., Transl Oncol 7(1), 2014: (stored - intercept) / slope."""
    files = stack(images(), Manufacturer="Philips")
    for number, file in enumerate(files):
        block = file.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        block.add_new(0x0E, "FL", 0.5 + number // 10 / 4)
        block.add_new(0x0D, "FL", 16.0)
    subject, _, _ = reading(tmp_path, files)
    assert subject.vendor == "Philips"
    assert np.allclose(voxels(subject), (images() - 16) / (0.5 + np.arange(5) / 4)[:, None, None, None])


def test_one_scaling_keeps_whole_numbers(tmp_path):
    """As from a NIfTI file with a slope: grey levels are stored as they are."""
    subject, _, _ = reading(tmp_path, stack(images(), RescaleSlope=2.5, RescaleIntercept=10))
    cine = read_cine(subject)
    assert np.allclose(voxels(subject), images() * 2.5 + 10)
    assert cine.scale == pytest.approx(1 / 2.5) and np.unique(cine.stored).size == np.unique(images()).size


def test_label_maps_lie_on_the_stack(tmp_path):
    """A mark on one voxel comes back at the same place."""
    subject, _, _ = reading(tmp_path, stack(images()))
    cine = read_cine(subject)
    labels = (cine.stored == cine.stored.max()).astype(np.uint8)
    write_labels(tmp_path / "l.nii.gz", labels, cine.geometry, cine_image(subject))
    read = nibabel.load(tmp_path / "l.nii.gz")
    z, t, row, column = np.argwhere(images() == images().max())[0]
    assert np.allclose(read.affine, expected_affine(), atol=1e-3) and read.get_data_dtype() == np.uint8
    assert np.asanyarray(read.dataobj)[column, 23 - row, z, t] == 1
    assert read.header.get_zooms()[3] == pytest.approx(RR / 10 / 1000)


def test_a_real_cine_as_dicom_is_stored_like_its_nifti_file(tmp_path, bivme):
    """Every second pixel and third frame of it, one series a slice, rows and columns as in the file."""
    source = nibabel.load(next(path for path in bivme.rglob("*_sa.nii.gz")))
    voxels = np.asarray(source.dataobj)[::2, ::2, :, ::3].astype(np.uint16)
    affine = source.affine @ np.diag([2.0, 2.0, 1.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "same.nii")
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    steps = np.linalg.norm(lps[:3, :2], axis=0)
    axes, files = (lps[:3, :2] / steps).T.ravel(), []
    for z, t in np.ndindex(voxels.shape[2:]):
        files.append(dataset(
            voxels[:, :, z, t].T, InstanceNumber=t, TriggerTime=34.5 * 3 * t, SeriesInstanceUID=f"1.2.{z}",
            ImagePositionPatient=[f"{v:.6f}" for v in lps[:3] @ (0, 0, z, 1)], SeriesNumber=99 - z,
            ImageOrientationPatient=[f"{v:.8f}" for v in axes], PixelSpacing=list(steps[::-1]),
        ))  # fmt: skip
    subject, notes, left = reading(tmp_path, files)
    ours, theirs = read_cine(subject), read_cine(Subject("folder", "same", tmp_path / "same.nii"))
    assert ours.digest == theirs.digest and not notes and not left
    assert ours.geometry.spacing_mm == pytest.approx(theirs.geometry.spacing_mm)
    assert ours.geometry.slice_pitch_mm == pytest.approx(theirs.geometry.slice_pitch_mm, rel=1e-5)
    assert ours.heart_rate_per_min == pytest.approx(60000 / (34.5 * 27))


def contour_volumes(subject) -> dict[tuple[str, int], float]:
    """{(i or o, frame): ml inside the expert's endo- or epicardial contours}, one file a slice, x y in
    pixels.
    """
    places = {i.path.stem: t for line in subject.source.grid for t, i in enumerate(line)}
    voxel_ml = abs(np.linalg.det(cine_image(subject).affine[:3, :3])) / 1000
    found: Counter = Counter()
    fine = 4  # sub-pixels along a side
    for path in (SHARED / subject.id / "contours").glob("IM-0001-*"):
        _, _, number, kind, _ = path.stem.split("-")
        corners = np.loadtxt(path)[:, ::-1]
        corners = (corners - np.floor(corners.min(axis=0)) + 0.5) * fine - 0.5
        inside = polygon2mask(np.ceil(corners.max(axis=0)).astype(int) + 1, corners)
        found[kind[0], places[str(int(number))]] += inside.sum() / fine**2 * voxel_ml
    return dict(found)


@sunnybrook
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SCD0000101", {("i", 7): 141.3, ("i", 18): 191.3, ("o", 18): 302.5}),
        ("SCD0000301", {("i", 6): 179.6, ("i", 19): 229.7, ("o", 19): 355.5}),
    ],
)
def test_expert_contours_enclose_volumes_at_one_frame_a_phase(tmp_path, name, expected):
    """All slices' contours of a phase lie at one frame. Expected in ml: areas by the shoelace formula, times
    the distance of the slices in the header. Ejection fractions: 26.1 and 21.8 %.
    """
    (subject,), _ = data.find([str(SHARED / name)], tmp_path)
    assert contour_volumes(subject) == pytest.approx(expected, rel=0.01)


def test_a_prediction_has_the_heart_rate_and_volumes_by_body_surface(tmp_path):
    """Du Bois, by hand: 1.70 m and 70 kg have 1.8097 square metres."""
    files = stack(images(5, 8, rows=40, columns=40), PatientSize="1.70", PatientWeight="70")
    subject, _, _ = reading(tmp_path, files)
    row, _ = prediction.predict(subject, [network(0)], torch.device("cpu"), tmp_path)
    assert row["error"] == "" and row["heart_rate_per_min"] == pytest.approx(60000 / RR)
    assert row["body_surface_m2"] == pytest.approx(1.8097, abs=1e-4)
    assert row["lv_edv_ml_per_m2"] == pytest.approx(row["lv_edv_ml"] / 1.8097, rel=1e-4)
    labels = nibabel.load(tmp_path / "study_labels.nii.gz")
    assert np.allclose(labels.affine, expected_affine(rows=40), atol=1e-3) and labels.shape == (40, 40, 5, 8)
