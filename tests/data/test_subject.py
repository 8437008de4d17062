import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from loop import segmentation

from cmrssp.data import dataset, store
from cmrssp.data.batches import collate
from cmrssp.data.cine import heart_centre, intensity_statistics, read_cine
from cmrssp.data.geometry import Geometry
from cmrssp.data.labels import read_labels
from cmrssp.data.motion import temporal_deviation
from cmrssp.data.subject import NOT_MEASURED, BrokenSubject, Subject
from cmrssp.segmentation import predict_frames

CACHE = Path(os.devnull)  # nothing can be written there


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
    assert (geometry.axes, geometry.flip) == ((2, rows_axis, 1 - rows_axis), flip)
    assert geometry.spacing_mm == pytest.approx((1.4, 1.2) if rows_axis == 1 else (1.2, 1.4))
    assert geometry.slice_pitch_mm == pytest.approx(8.0)


def test_the_pitch_is_the_distance_of_the_slice_planes():
    """Slices of 8 mm that lean by 6 mm along the rows: a step of 10 mm, planes 8 mm apart. The voxel's volume
    is the determinant of the affine.
    """
    leaning = affine((LEFT, BACK, APEX))
    leaning[:3, 2] += 6 * np.array(LEFT) / np.linalg.norm(LEFT)
    geometry = Geometry.from_affine(leaning)
    assert np.linalg.norm(leaning[:3, 2]) == pytest.approx(10) and geometry.slice_pitch_mm == pytest.approx(8)
    volume = geometry.slice_pitch_mm * np.prod(geometry.spacing_mm)
    assert volume == pytest.approx(abs(np.linalg.det(leaning[:3, :3])))


def test_canonical_axes_are_the_same_heart_in_every_storage_order():
    canonical = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # (T, Z, H, W)
    seen = set()
    for rows_axis in (0, 1):
        for flips in np.ndindex(2, 2, 2):
            geometry = Geometry((2, rows_axis, 1 - rows_axis), tuple(map(bool, flips)), (1.0, 1.0), 8.0)
            stored = geometry.from_canonical(canonical)
            assert stored.shape == ((4, 5, 3, 2) if rows_axis == 0 else (5, 4, 3, 2))
            assert (geometry.to_canonical(stored) == canonical).all()
            seen.add(stored.tobytes())
    assert len(seen) == 16
    # rows on axis 1, only the columns reversed: file voxel (x, y, z, t) is canonical (t, z, y, 4 - x)
    assert (
        Geometry((2, 1, 0), (False, False, True), (1.0, 1.0), 8.0).from_canonical(canonical)[1, 2, 0, 1]
        == canonical[1, 0, 2, 3]
    )


def test_read_mnms_subject(write_mnms, beating):
    cine, labels = beating()
    folder = write_mnms("A0S9V9", cine - 7, labels)
    (folder / "table.csv").write_text(
        ",External code,VendorName,Vendor,ED,ES,Pathology\n0,A0S9V9,GE,C,2,1,HCM\n"
    )
    (subject,) = dataset.find([folder], CACHE)[0]
    assert (subject.key, subject.vendor, subject.pathology, subject.ed) == ("mnms/A0S9V9", "GE", "HCM", 2)
    read = read_cine(subject)
    assert read.minimum == cine.min() - 7 and read.scale == 1.0
    # RAS axes: columns are x reversed, rows y reversed
    assert (read.stored == (cine - cine.min())[::-1, ::-1].transpose(3, 2, 1, 0)).all()
    found = read_labels(subject, read, read.stored)
    assert (found.frames, found.ed, found.es) == (
        (0, 2),
        2,
        0,
    )  # the larger blood pool is ED, whatever the order
    (problem,) = found.problems
    assert problem.what.startswith("ES is frame 0 by the labels, the data set says ED 2 and ES 1")
    assert (problem.subject, problem.done) == ("mnms/A0S9V9", "used with correction")
    assert (found.masks[1] == labels[::-1, ::-1, :, 2].transpose(2, 1, 0)).all()


def test_fractional_and_large_intensities_keep_their_proportions(tmp_path):
    values = np.linspace(0.25, 0.75, 4 * 4 * 2).reshape(4, 4, 2).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a_sa.nii.gz")
    read = read_cine(Subject("mnms", "a", tmp_path / "a_sa.nii.gz"))
    assert read.stored.min() == 0 and read.stored.max() == 32767
    back = read.stored.astype(np.float64) / read.scale + read.minimum
    assert np.abs(read.geometry.from_canonical(back)[..., 0] - values).max() <= 0.5 / read.scale + 1e-9


@pytest.mark.parametrize("kind", ["i1", "u1", "<i2", ">i2", "u2", "<i4", ">i4", "i8", "u8", "f4", ">f8"])
def test_whole_numbers_of_every_type_stay_exact(tmp_path, kind):
    """From the type's smallest value (or -30000) on, over as much as it or int16 holds."""
    limits = np.iinfo(kind) if np.dtype(kind).kind in "iu" else np.iinfo(np.int16)
    low = max(limits.min, -30000)
    values = np.linspace(low, min(limits.max, low + 32767), 60).round().reshape(5, 4, 3)
    image = nibabel.Nifti1Image(values.astype(kind), np.diag([1.5, 1.5, 8, 1]), dtype=kind)
    nibabel.save(image, tmp_path / "a.nii")
    read = read_cine(Subject("folder", "a", tmp_path / "a.nii"))
    assert read.scale == 1.0 and read.minimum == low
    assert (read.geometry.from_canonical(read.stored)[..., 0] == values - low).all()


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
    found = heart_centre(temporal_deviation(cine), (1.0, 1.0))
    assert found == pytest.approx((50, 62), abs=1.5)  # the prior draws it towards (59.5, 49.5)
    assert heart_centre(temporal_deviation(cine[:1]), (1.0, 1.0)) == (
        59.5,
        49.5,
    )  # one frame: the middle of the image


def test_a_truncated_file_is_named(write_mnms, beating):
    path = write_mnms("A", beating()[0]) / "A_sa.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BrokenSubject, match=r"A_sa\.nii\.gz: .*truncated"):
        read_cine(Subject("mnms", "A", path))


def refused(path, array, message):
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    with pytest.raises(BrokenSubject, match=rf"{path.name}: .*{message}"):
        read_cine(Subject("folder", "A", path))


def test_a_constant_is_no_image(tmp_path):
    refused(tmp_path / "A.nii.gz", np.full((4, 4, 2, 2), 7, np.int16), "constant .*7")


def test_an_image_of_which_much_is_no_number_is_named(tmp_path):
    """A quarter of 4 x 4 x 2 x 2 voxels."""
    array = np.arange(64.0).reshape(4, 4, 2, 2)
    array[0] = np.nan
    refused(tmp_path / "A.nii.gz", array, "16 of 64")


def test_a_few_voxels_that_are_no_number_are_set_to_the_minimum(write_mnms, beating):
    cine, _ = beating()
    odd = cine.astype(np.float32)
    odd[3, 4, 1, 0], odd[5, 6, 2, 1] = np.nan, np.inf
    odd[..., 2] = 7
    (subject,) = dataset.find([write_mnms("A", odd)], CACHE)[0]
    read = read_cine(subject)
    assert [(p.what, p.done) for p in read.problems] == [
        ("2 voxels are NaN or infinite: set to the minimum", "used with correction"),
        ("constant frames: 2 of 3, counted from 0", "used"),
    ]
    back = read.geometry.from_canonical(read.stored)
    assert back[3, 4, 1, 0] == back[5, 6, 2, 1] == 0 and back[5, 6, 2, 0] == cine[5, 6, 2, 0] - cine.min()


def test_a_cine_of_one_frame_is_used_and_reported(write_mnms, beating):
    (subject,) = dataset.find([write_mnms("A", beating()[0][..., 0])], CACHE)[0]
    read = read_cine(subject)
    assert read.stored.shape == (1, 3, 32, 40) and read.centre == (15.5, 19.5)
    assert "one frame where a cine has many" in read.problems[0].what


def header_of(tmp_path, **fields):
    """A cine file with these header fields, and what is found in it."""
    image = nibabel.Nifti1Image(
        np.arange(60, dtype=np.int16).reshape(5, 4, 3, 1), np.diag([1.2, 1.4, 8.0, 1.0])
    )
    raw = bytearray(image.to_bytes())
    header = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
    header["sform_code"], header["qform_code"] = 1, 0
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.binaryblock
    (tmp_path / "a.nii").write_bytes(raw)
    read = read_cine(Subject("folder", "a", tmp_path / "a.nii"))
    return read.geometry, [(p.what, p.done) for p in read.problems if p.done != NOT_MEASURED]  # it is tiny


UNSET = [1, 1, 1, 1, 1, 1, 1, 1]
NO_AFFINE = {"srow_x": 0, "srow_y": 0, "srow_z": 0}
IDENTITY = {"srow_x": [1, 0, 0, 0], "srow_y": [0, 1, 0, 0], "srow_z": [0, 0, 1, 0]}


@pytest.mark.parametrize(
    ("fields", "spacing", "said"),
    [
        ({}, (1.4, 1.2, 8), ""),
        ({"pixdim": [-1, 1.2, 1.4, 8, 1, 1, 1, 1]}, (1.4, 1.2, 8), ""),
        ({"pixdim": UNSET}, (1.4, 1.2, 8), "the affine was used"),
        (
            {"pixdim": [1, 1.2, 1.4, 10, 1, 1, 1, 1]},
            (1.4, 1.2, 8),
            "pixdim says 1.2 x 1.4 x 10 mm, the affine 1.2",
        ),
        (NO_AFFINE, (1.4, 1.2, 8), "the affine is empty: spacing 1.2 x 1.4 x 8 mm from pixdim"),
        (IDENTITY, (1.4, 1.2, 8), "the affine has no spacing: 1.2 x 1.4 x 8 mm from pixdim"),
        (
            {**IDENTITY, "pixdim": UNSET},
            (1, 1, 1),
            "spacing of 1 x 1 x 1 mm (rows, columns, slices) is unusual",
        ),
    ],
)
def test_affine_and_voxel_sizes(tmp_path, fields, spacing, said):
    geometry, problems = header_of(tmp_path, **fields)
    assert (*geometry.spacing_mm, geometry.slice_pitch_mm) == pytest.approx(spacing)
    if said:
        assert any(said in what for what, _ in problems), problems
    else:
        assert problems == []


def test_no_spacing_at_all(tmp_path):
    with pytest.raises(BrokenSubject, match=r"a\.nii: expected a spacing in the affine or in pixdim"):
        header_of(tmp_path, **NO_AFFINE, pixdim=UNSET)


def test_a_header_that_claims_more_than_the_file_holds(tmp_path):
    with pytest.raises(BrokenSubject, match="its header claims 3932040 bytes of voxels, the file has"):
        header_of(tmp_path, dim=[4, 5, 4, 3, 32767, 1, 1, 1])


def test_the_same_heart_in_every_storage_order(tmp_path, beating):
    """One oblique heart stored with its in-plane axes swapped or not and each axis reversed or not: the same
    slices, positions and crop centre, and label maps that fit each file's own voxels, worked out by numpy
    alone.
    """
    cine, labels = beating()
    first = affine((LEFT, BACK, APEX), (1.2, 1.4, 12.0))
    first[:3, 3] = (40, -20, 30)
    torch.manual_seed(1)
    method = segmentation(channels=[4, 8, 8], image_size=32, spacing_mm=3.0).eval()
    seen, number = [], 0
    for swapped in (False, True):
        for flips in np.ndindex(2, 2, 2):
            order = (1, 0, 2, 3) if swapped else (0, 1, 2, 3)
            axes = [axis for axis in range(3) if flips[axis]]

            def restored(array, order=order, axes=axes):
                return np.flip(array.transpose(order[: array.ndim]), axes)

            turn = np.eye(4)[:, order]
            for axis in axes:
                turn[:, 3] += turn[:, axis] * (np.array(cine.shape)[list(order)][axis] - 1)
                turn[:, axis] *= -1
            folder = tmp_path / f"{number}"
            folder.mkdir()
            for name, array in (("h_sa", cine), ("h_sa_gt", labels)):
                nibabel.save(nibabel.Nifti1Image(restored(array), first @ turn), folder / f"{name}.nii.gz")
            subjects, _ = dataset.find([folder], CACHE)
            cines = store.build(subjects, tmp_path / "cache", labels=True)
            record = cines.cines[0]
            batch = collate(cines, [(0, 2, z) for z in range(3)], labelled=True)
            (predicted,) = predict_frames([method], cines, 0, [2], torch.device("cpu"))
            back = record.geometry.from_canonical(predicted[None])[..., 0]
            seen.append((record, batch, predicted))
            assert [p.what for p in record.problems] == []
            assert (batch["image"] == seen[0][1]["image"]).all() and (
                batch["label"] == seen[0][1]["label"]
            ).all()
            assert batch["position"].tolist() == pytest.approx([0, 1 / 3, 2 / 3])
            assert (
                record.geometry.spacing_mm == pytest.approx((1.4, 1.2)) and record.centre == seen[0][0].centre
            )
            own = seen[0][0].geometry.from_canonical(seen[0][2][None])[
                ..., 0
            ]  # on the grid of the first file
            assert len(np.unique(back)) > 1 and (back == restored(own)).all()
            number += 1
    assert number == 16


@pytest.mark.parametrize(
    ("change", "message"), [("shape", "expected the cine's shape"), ("ids", "expected label ids 0 to 3")]
)
def test_labels_that_do_not_fit_are_named(write_mnms, beating, change, message):
    cine, labels = beating()
    labels = labels[:-1] if change == "shape" else labels * 3
    (subject,) = dataset.find([write_mnms("A", cine, labels)], CACHE)[0]
    read = read_cine(subject)
    with pytest.raises(BrokenSubject, match=message):
        read_labels(subject, read, read.stored)


def test_real_acdc_patient(acdc70):
    subjects = dataset.find([acdc70], CACHE)[0]
    assert len(subjects) == 70
    subject = next(s for s in subjects if s.id == "patient003")
    read = read_cine(subject)
    labels = read_labels(subject, read, read.stored)
    raw = np.asanyarray(nibabel.load(acdc70 / "patient003" / "patient003_frame02_gt.nii.gz").dataobj)
    assert (labels.frames, labels.ed, labels.es) == ((0, 1), 0, 1)
    for theirs, ours in ((1, 3), (2, 2), (3, 1)):  # RV, MYO, LV
        assert (labels.masks[1] == ours).sum() == (raw == theirs).sum()


def test_real_oblique_cine_runs_from_apex_to_base(bivme):
    (subject,) = dataset.find([bivme], CACHE)[0]
    read = read_cine(subject)
    assert read.stored.shape == (25, 6, 208, 256)
    assert read.geometry.flip[0]
    assert read.geometry.slice_pitch_mm == pytest.approx(17.7, abs=1e-3)  # the README of the data
    labels = read_labels(subject, read, read.stored)
    areas = (labels.masks[labels.frames.index(labels.ed)] == 1).sum(axis=(1, 2))
    assert areas[:2].mean() > areas[-2:].mean()


def test_centre_without_labels_on_real_patients(acdc70):
    """At least 68 of 70 whole hearts inside a 200 mm square, at the nominal spacing of these data."""
    inside = 0
    for subject in dataset.find([acdc70], CACHE)[0]:
        read = read_cine(subject)
        heart = read_labels(subject, read, read.stored).masks.any(axis=(0, 1))
        rows, columns = np.nonzero(heart)
        reach = max(
            np.abs(rows - read.centre[0]).max() * read.geometry.spacing_mm[0],
            np.abs(columns - read.centre[1]).max() * read.geometry.spacing_mm[1],
        )
        inside += reach <= 100
    assert inside >= 68


def test_layouts_ignore_what_is_not_theirs(tmp_path):
    Path(tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no cine found; expected \.nii or"):
        dataset.find([tmp_path], CACHE)


def test_borders_of_zeros_are_left_out_where_zero_is_not_the_smallest_value(tmp_path):
    cine = np.zeros((12, 10, 3, 4), np.int16)
    cine[2:10, 3:8] = np.random.default_rng(0).integers(100, 1000, (8, 5, 3, 4))
    cine[5, 5, 1, 2] = -3
    nibabel.save(nibabel.Nifti1Image(cine, np.diag([1.5, 1.5, 8, 1])), tmp_path / "a.nii")
    read = read_cine(Subject("folder", "a", tmp_path / "a.nii"))
    inside = cine[2:10, 3:8].astype(np.float64) + 3
    assert (read.mean, read.std) == pytest.approx((inside.mean(), inside.std()), rel=1e-6)


@pytest.mark.parametrize("sform", [np.eye(4), np.zeros((4, 4))])
def test_a_qform_is_believed_where_the_sform_says_nothing(tmp_path, sform):
    oblique = affine((LEFT, BACK, np.negative(APEX)))
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(5, 4, 3, 1), oblique)
    image.set_qform(oblique, code=1)
    image.set_sform(sform, code=1)
    nibabel.save(image, tmp_path / "a.nii")
    geometry = read_cine(Subject("folder", "a", tmp_path / "a.nii")).geometry
    assert geometry.flip == (True, False, False) and geometry.order_known
