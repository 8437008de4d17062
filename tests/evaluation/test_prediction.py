"""Label maps of new cines: clean-up, mirror images, ensembles, the file that is written, the flags."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from test_scoring import network

from cmrssp.data import dataset, store
from cmrssp.data.batches import collate
from cmrssp.data.cine import read_cine
from cmrssp.data.nifti import write_labels
from cmrssp.data.subject import Subject
from cmrssp.evaluation import prediction
from cmrssp.segmentation import keep_largest, predict_frames


@pytest.fixture
def one(write_mnms, beating, tmp_path):
    subjects, _ = dataset.find([write_mnms("A", *beating())], tmp_path)
    return store.build(subjects, tmp_path / "cache", labels=True)


def test_the_largest_component_of_each_class_stays():
    labels = np.zeros((3, 6, 8), np.uint8)
    labels[0, 0:2, 0:2] = 1  # four voxels, and one that touches them at a corner of the next slice
    labels[1, 2, 2] = 1
    labels[2, 5, 5:8] = 1  # three elsewhere
    labels[2, 0, 0] = 3
    kept = keep_largest(labels)
    expected = labels.copy()
    expected[2, 5, 5:8] = 0
    assert (kept == expected).all()
    assert not keep_largest(np.zeros_like(labels)).any()


def test_probabilities_are_averaged_over_networks_and_mirror_images(one):
    cpu, methods = torch.device("cpu"), [network(1), network(2, size=16, spacing=6.0)]
    batch = collate(one, [(0, 0, z) for z in range(3)], labelled=False)
    mean = sum(method.probabilities(batch) for method in methods)
    (labels,) = predict_frames(methods, one, 0, [0], cpu)
    assert (labels == mean.argmax(dim=1)[:, :32, :40].numpy()).all() and len(np.unique(labels)) > 1
    (single,) = predict_frames(methods[:1], one, 0, [0], cpu)
    assert (single != labels).any()
    # mirror the native image by hand: the crop centre moves along, and the mean of the four is the same
    total = 0.0
    for axes in ((), (2,), (3,), (2, 3)):
        mirrored = dict(batch)
        image = batch["image"][:, :, :32, :40].flip(axes)
        mirrored["image"] = torch.nn.functional.pad(image, (0, 24, 0, 32))
        centre = batch["centre"].clone()
        for axis, column, count in ((2, 0, 32), (3, 1, 40)):
            if axis in axes:
                centre[:, column] = count - 1 - centre[:, column]
        mirrored["centre"] = centre
        total = total + methods[0].probabilities(mirrored)[:, :, :32, :40].flip(axes) / 4
    with_flips = methods[0].probabilities(batch, flips=True)[:, :, :32, :40]
    assert torch.allclose(with_flips, total, atol=1e-5)
    assert not torch.allclose(with_flips, methods[0].probabilities(batch)[:, :, :32, :40], atol=1e-3)


@pytest.mark.parametrize("empty_affine", [False, True])
def test_a_label_map_lies_on_the_grid_of_its_cine(tmp_path, empty_affine):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 90, (9, 7, 3, 2)).astype(np.int16)
    image = nibabel.Nifti1Image(array, np.diag([-1.2, 1.4, -8.0, 1.0]))
    image.header.set_zooms((1.2, 1.4, 8.0, 0.03))
    image.header.set_slope_inter(2.0, 5.0)
    raw = bytearray(image.to_bytes())
    if empty_affine:
        header = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
        header["srow_x"], header["srow_y"], header["srow_z"] = 0, 0, 0
        header["sform_code"], header["qform_code"] = 1, 0
        raw[:348] = header.binaryblock
    (tmp_path / "a.nii").write_bytes(raw)
    read = read_cine(Subject("folder", "a", tmp_path / "a.nii"))
    source = nibabel.load(tmp_path / "a.nii")
    write_labels(tmp_path / "l.nii.gz", (read.stored % 4).astype(np.uint8), read.geometry, source)
    labels = nibabel.load(tmp_path / "l.nii.gz")
    expected = (array - array.min()) % 4
    assert labels.get_data_dtype() == np.uint8 and (np.asanyarray(labels.dataobj) == expected).all()
    assert np.asanyarray(labels.dataobj).dtype == np.uint8  # no scaling
    assert (labels.affine == source.affine).all() and labels.header.get_zooms() == source.header.get_zooms()
    for name in ("sform_code", "qform_code", "pixdim", "xyzt_units", "srow_x", "quatern_b"):
        assert (labels.header[name] == source.header[name]).all(), name


def heart(frames: int = 6) -> np.ndarray:
    """(T, Z, H, W): a cavity that shrinks and grows in a closed wall, and an RV beside it."""
    labels = np.zeros((frames, 4, 60, 60), np.uint8)
    y, x = np.mgrid[:60, :60]
    for t in range(frames):
        radius = 9 + 3 * np.cos(2 * np.pi * t / frames)
        labels[t, :, np.hypot(y - 30, x - 30) < 16] = 2
        labels[t, :, np.hypot(y - 30, x - 30) < radius] = 1
        labels[t, :, 20 : 35 + round(5 * np.cos(2 * np.pi * t / frames)), 8:14] = 3
    return labels


def test_frames_that_look_wrong_are_not_trained_on():
    labels = heart()
    labels[1][labels[1] == 3] = 0  # no RV
    labels[2, :, :, :30][labels[2, :, :, :30] == 2] = 0  # half of the cavity lies open
    volumes = {n: (labels == i).sum(axis=(1, 2, 3)) * 1.0 for i, n in enumerate(("LV", "MYO", "RV"), 1)}
    assert prediction.good_frames(labels, volumes, range(6), {1, 6}) == [0, 3, 4, 5]
    assert prediction.good_frames(labels, volumes, [0, 4], ()) == [0, 4]
    for doubtful in (7, 5):  # not measured, implausible
        assert prediction.good_frames(labels, volumes, range(6), {doubtful, 1}) == []


def flagged(labels: np.ndarray, one, reach: float = 80.0) -> list[str]:
    record = replace(
        one.cines[0], shape=labels.shape, centre=(29.5, 29.5), sound_frames=tuple(range(len(labels)))
    )
    volumes = {n: (labels == i).sum(axis=(1, 2, 3)) * 1.0 for i, n in enumerate(("LV", "MYO", "RV"), 1)}
    return [what for _, what in prediction.flags(labels, volumes, record, reach)]


def test_a_sound_heart_has_no_flag(one):
    assert flagged(heart(), one) == []


def test_what_looks_wrong_is_flagged_worst_first(one):
    labels = heart(20)
    assert flagged(labels, one) == []
    labels[:, :, :, 30:][labels[:, :, :, 30:] == 2] = 0  # half of the wall is gone
    labels[4, :, 30:] = 0
    labels[2, 0, 2, 2] = 1  # one voxel of thousands: no flag
    found = flagged(labels, one)
    assert found[1:] == [f"jump in the {name} volume at frame 4" for name in ("LV", "RV")]
    share = int(found[0].partition("(")[2].partition(" %")[0])
    assert found[0].startswith("LV cavity not enclosed by myocardium") and 45 <= share <= 55
    labels = heart()
    labels[:, :, 20:40, 8:14] = 0
    for t, rows in enumerate((10, 4, 2, 12, 12, 8)):  # largest when the LV is smallest, in frame 3
        labels[t, :, 20 : 20 + rows, 8:14] = 3
    assert flagged(labels, one)[0] == "implausible RV ejection fraction of -20 %"  # 1 - 12 / 10
    labels[0][labels[0] == 3] = 0
    assert flagged(labels, one)[0] == "no RV at ED"
    labels = heart()
    labels[3, 1, 2:6, 50:54] = 3
    assert flagged(labels, one) == ["more than one component: RV"]
    labels = heart()
    labels[1][labels[1] == 1] = 2
    assert flagged(labels, one)[0] == "no LV in 1 of 6 frames"
    assert flagged(np.where(heart() == 3, 0, heart()), one) == ["no RV in any frame"]
    # the RV reaches 21.5 pixels of 1.5 mm from the centre
    assert flagged(heart(), one, reach=33.0) == ["touches the edge of the crop"]
    assert flagged(heart(), one, reach=36.0) == []


def curve(frames: int) -> np.ndarray:
    """From 100 ml in frame 0 to 40 ml in the middle."""
    return 70 + 30 * np.cos(2 * np.pi * np.arange(frames) / frames)


def test_ed_and_es_are_the_extremes_of_a_sound_curve():
    assert prediction.find_phases(curve(20), range(20)) == ({"ED": 0, "ES": 10}, [])


@pytest.mark.parametrize(
    ("bad", "ml", "sound"),
    [(3, 0.0, True), (3, 160.0, True), (7, 5.0, True), (4, 110.0, False), (19, 0.0, True), (19, 1.0, False)],
)
def test_ed_and_es_are_robust_to_one_bad_frame(bad, ml, sound):
    lv = curve(20)
    lv[bad] = ml
    frames = [t for t in range(20) if sound or t != bad]
    assert prediction.find_phases(lv, frames) == ({"ED": 0, "ES": 10}, [bad])


def test_ed_and_es_of_little():
    assert prediction.find_phases(np.array([80.0]), [0]) == ({"ED": 0}, [])
    assert prediction.find_phases(np.array([80.0, 0.0]), [0, 1]) == ({"ED": 0}, [1])
    assert prediction.find_phases(np.zeros(3), [0, 1, 2]) == ({"ED": 0, "ES": 0}, [])


def test_extremes_that_lie_far_apart_are_flagged(one):
    labels = np.concatenate([heart(10), heart(10)])  # two beats
    found = flagged(labels, one)
    assert [what for what in found if "largest" in what and "0 and 10" in what]
    assert [what for what in found if "smallest" in what and "5 and 15" in what]
