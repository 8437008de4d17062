from pathlib import Path

import nibabel
import numpy as np
import pytest

from cmrssp.data import acdc, mnms
from cmrssp.data.subject import (
    BrokenSubject,
    Geometry,
    Subject,
    heart_centre,
    intensity_statistics,
    read_cine,
    read_labels,
)


def affine(columns, spacing=(1.2, 1.4, 8.0)):
    """4x4 from three RAS+ directions, made unit, times the spacing."""
    directions = np.array(columns, float).T
    matrix = np.eye(4)
    matrix[:3, :3] = directions / np.linalg.norm(directions, axis=0) * spacing
    return matrix


APEX, LEFT, BACK = (-1, 1, -1), (-2, -1, 1), (0, -1, -1)  # of a true short axis, worked by hand


@pytest.mark.parametrize(
    ("columns", "rows_axis", "flip"),
    [
        ((LEFT, BACK, APEX), 1, (False, False, False)),
        ((BACK, LEFT, APEX), 0, (False, False, False)),
        ((LEFT, BACK, np.negative(APEX)), 1, (True, False, False)),
        ((np.negative(LEFT), BACK, APEX), 1, (False, False, True)),
        ((np.negative(BACK), np.negative(LEFT), np.negative(APEX)), 0, (True, True, True)),
        (
            ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
            1,
            (False, True, True),
        ),  # axis-aligned: says nothing of the slice order
        (((-1, 0, 0), (0, -1, 0), (0, 0, -1)), 1, (False, False, False)),
    ],
)
def test_geometry_from_affine(columns, rows_axis, flip):
    geometry = Geometry.from_affine(affine(columns))
    assert (geometry.rows_axis, geometry.flip) == (rows_axis, flip)
    assert geometry.spacing_mm == pytest.approx((1.4, 1.2) if rows_axis == 1 else (1.2, 1.4))
    assert geometry.slice_pitch_mm == pytest.approx(8.0)


def test_canonical_axes_are_the_same_heart_in_every_storage_order():
    canonical = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # (T, Z, H, W)
    seen = set()
    for rows_axis in (0, 1):
        for flips in np.ndindex(2, 2, 2):
            geometry = Geometry(rows_axis, tuple(map(bool, flips)), (1.0, 1.0), 8.0)
            stored = geometry.from_canonical(canonical)
            assert stored.shape == ((4, 5, 3, 2) if rows_axis == 0 else (5, 4, 3, 2))
            assert (geometry.to_canonical(stored) == canonical).all()
            seen.add(stored.tobytes())
    assert len(seen) == 16
    # rows on axis 1, only the columns reversed: file voxel (x, y, z, t) is canonical (t, z, y, 4 - x)
    assert (
        Geometry(1, (False, False, True), (1.0, 1.0), 8.0).from_canonical(canonical)[1, 2, 0, 1]
        == canonical[1, 0, 2, 3]
    )


def test_affine_that_is_no_geometry(write_mnms, beating):
    broken = np.diag([1.5, 1.5, 0.0, 1.0])
    with pytest.raises(ValueError, match="three axes of finite length"):
        Geometry.from_affine(broken)


def test_read_mnms_subject(write_mnms, beating):
    cine, labels = beating()
    folder = write_mnms("A0S9V9", cine - 7, labels)
    (folder / "table.csv").write_text(
        ",External code,VendorName,Vendor,ED,ES,Pathology\n0,A0S9V9,GE,C,2,1,HCM\n"
    )
    (subject,) = mnms.find(folder)
    assert (subject.key, subject.vendor, subject.pathology, subject.ed) == ("mnms/A0S9V9", "GE", "HCM", 2)
    read = read_cine(subject)
    assert read.minimum == cine.min() - 7 and read.scale == 1.0
    # RAS axes: columns are x reversed, rows y reversed
    assert (read.stored == (cine - cine.min())[::-1, ::-1].transpose(3, 2, 1, 0)).all()
    found = read_labels(subject, read.geometry, read.stored.shape)
    assert (found.frames, found.ed, found.es) == (
        (0, 2),
        2,
        0,
    )  # the larger blood pool is ED, whatever the order
    assert found.problems == ("ES is frame 0, the table says 1 (both counted from 0)",)
    assert (found.masks[1] == labels[::-1, ::-1, :, 2].transpose(2, 1, 0)).all()


def test_fractional_and_large_intensities_keep_their_proportions(tmp_path):
    values = np.linspace(0.25, 0.75, 4 * 4 * 2).reshape(4, 4, 2).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a_sa.nii.gz")
    read = read_cine(Subject("mnms", "a", tmp_path / "a_sa.nii.gz"))
    assert read.stored.min() == 0 and read.stored.max() == 32767
    back = read.stored.astype(np.float64) / read.scale + read.minimum
    assert np.abs(read.geometry.from_canonical(back)[..., 0] - values).max() <= 0.5 / read.scale + 1e-9


def test_statistics_leave_zero_borders_out():
    cine = np.zeros((2, 1, 4, 5), np.int16)
    cine[:, 0, 1:3, 1:3] = [[1, 2], [3, 6]]
    cine[1, 0, 1, 1] = 0  # inside the box: counts
    values = [1, 2, 3, 6, 0, 2, 3, 6]
    assert intensity_statistics(cine) == pytest.approx((np.mean(values), np.std(values)))


def test_heart_centre_finds_what_beats():
    rows, columns = np.meshgrid(np.arange(120), np.arange(100), indexing="ij")
    distance = np.hypot(rows - 50, columns - 62)
    cine = np.stack([np.stack([(distance < radius) * 100] * 3) for radius in (9, 12, 15)]).astype(np.int16)
    found = heart_centre(cine, (1.0, 1.0))
    assert found == pytest.approx((50, 62), abs=1.5)  # the prior draws it towards (59.5, 49.5)
    assert heart_centre(cine[:1], (1.0, 1.0)) == (59.5, 49.5)  # one frame: the middle of the image


def test_broken_files_are_named(tmp_path, write_mnms, beating):
    cine, labels = beating()
    folder = write_mnms("A", cine, labels)
    whole = (folder / "A_sa.nii.gz").read_bytes()
    (folder / "A_sa.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BrokenSubject, match=r"A_sa\.nii\.gz: cannot be read as NIfTI, it may be truncated"):
        read_cine(mnms.find(folder)[0])
    nibabel.save(nibabel.Nifti1Image(np.full((4, 4, 2, 2), 7, np.int16), np.eye(4)), folder / "A_sa.nii.gz")
    with pytest.raises(BrokenSubject, match="constant 7 everywhere"):
        read_cine(mnms.find(folder)[0])
    bad = cine.astype(np.float32)
    bad[0, 0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(bad, np.eye(4)), folder / "A_sa.nii.gz")
    with pytest.raises(BrokenSubject, match="NaN or infinity"):
        read_cine(mnms.find(folder)[0])


@pytest.mark.parametrize(
    ("change", "message"), [("shape", "expected the cine's shape"), ("ids", "expected label ids 0 to 3")]
)
def test_labels_that_do_not_fit_are_named(write_mnms, beating, change, message):
    cine, labels = beating()
    labels = labels[:-1] if change == "shape" else labels * 3
    (subject,) = mnms.find(write_mnms("A", cine, labels))
    read = read_cine(subject)
    with pytest.raises(BrokenSubject, match=message):
        read_labels(subject, read.geometry, read.stored.shape)


def test_real_acdc_patient(acdc70):
    subjects = acdc.find(acdc70)
    assert len(subjects) == 70
    subject = next(s for s in subjects if s.id == "patient003")
    read = read_cine(subject)
    labels = read_labels(subject, read.geometry, read.stored.shape)
    raw = np.asanyarray(nibabel.load(acdc70 / "patient003" / "patient003_frame02_gt.nii.gz").dataobj)
    assert (labels.frames, labels.ed, labels.es) == ((0, 1), 0, 1)
    for theirs, ours in ((1, 3), (2, 2), (3, 1)):  # RV, MYO, LV
        assert (labels.masks[1] == ours).sum() == (raw == theirs).sum()


def test_real_oblique_cine_runs_from_apex_to_base(bivme):
    (subject,) = mnms.find(bivme)
    read = read_cine(subject)
    assert read.stored.shape == (25, 6, 208, 256)
    assert read.geometry.flip[0]
    assert read.geometry.slice_pitch_mm == pytest.approx(17.7, abs=1e-3)  # the README of the data
    labels = read_labels(subject, read.geometry, read.stored.shape)
    areas = (labels.masks[labels.frames.index(labels.ed)] == 1).sum(axis=(1, 2))
    assert areas[:2].mean() > areas[-2:].mean()


def test_centre_without_labels_on_real_patients(acdc70):
    """At least 68 of 70 whole hearts inside a 200 mm square, at the nominal spacing of these data."""
    inside = 0
    for subject in acdc.find(acdc70):
        read = read_cine(subject)
        heart = read_labels(subject, read.geometry, read.stored.shape).masks.any(axis=(0, 1))
        rows, columns = np.nonzero(heart)
        reach = max(
            np.abs(rows - read.centre[0]).max() * read.geometry.spacing_mm[0],
            np.abs(columns - read.centre[1]).max() * read.geometry.spacing_mm[1],
        )
        inside += reach <= 100
    assert inside >= 68


def test_layouts_ignore_what_is_not_theirs(tmp_path):
    Path(tmp_path / "notes.txt").write_text("")
    assert acdc.find(tmp_path) == [] and mnms.find(tmp_path) == []
