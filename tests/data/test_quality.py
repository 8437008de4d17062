"""The report on a data set: what is odd is found, named and counted; what is sound is not."""

import re

import numpy as np
import pytest

from cmrssp.data import dataset, quality, store
from cmrssp.data.__main__ import main


@pytest.fixture
def reported(tmp_path, write_mnms, capsys):
    """reported() -> (exit status, the report) on the M&Ms folder of write_mnms; a CSV keeps it quiet."""

    def run(*words):
        folder = tmp_path / "mnms"
        ids = sorted(p.name.split("_sa")[0] for p in folder.glob("*_sa.nii.gz"))
        rows = "".join(f"{i},{id},GE,C,NOR\n" for i, id in enumerate(ids))
        (folder / "t.csv").write_text(",External code,VendorName,Vendor,Pathology\n" + rows)
        status = main([str(folder), "--cache", str(tmp_path / "cache"), *words])
        return status, capsys.readouterr().out

    return run


def test_a_sound_data_set(reported, write_mnms, beating, tmp_path):
    for i, id in enumerate("AB"):
        write_mnms(id, *beating(i))
    status, text = reported("--figure", str(tmp_path / "report.png"))
    assert status == 0
    for line in (
        "cines: 2 subjects (mnms 2; vendors: GE 2), 6 frames, 18 slices",
        "sizes: 32 x 40 px of 1.5 mm; 3 slices, 3 frames; pitch 10 mm; slice order from the affine in 0, "
        "taken as base first in 2",
        "labels: 2 subjects, 12 slices; ED of 2, ES of 2",
        "2 of 2 within 160 mm, 2 of 2 within 200 mm",
        "problems: none found",
    ):
        assert line in text
    assert (tmp_path / "report.png").stat().st_size > 10000


def test_what_is_odd_is_reported_worst_first(reported, write_mnms, beating, tmp_path):
    for i, id in enumerate("ABCDEFGHIL"):
        cine, labels = beating(i)
        if id == "B":
            cine, labels = beating(0)  # the images of A
            labels = np.roll(labels, 1, axis=0)
        if id == "C":
            labels[..., 1:] = 0  # ED unlabelled
        if id == "D":
            labels[labels == 3] = 0
        if id == "E":
            labels[:, :, 0] = np.where(
                labels[:, :, 0] == 1, 2, labels[:, :, 0]
            )  # no LV where the base should be
        if id == "F":
            labels = labels[:-1]
        if id == "G":
            labels = labels * 3
        if id == "H":
            labels = np.zeros_like(labels)
        if id == "L":
            labels = np.array([0, 3, 2, 1], np.uint8)[labels]
        if id == "I":
            cine = np.full_like(cine, 5)
        folder = write_mnms(id, cine, labels)
    (folder / "K_sa_gt.nii.gz").write_bytes(b"")
    status, text = reported()
    assert status == 1
    lines = text.split("problems: ")[1].splitlines()
    assert lines[0] == "4 left out, 7 used"
    expected = (
        r"left out: mnms/F: .*F_sa_gt.nii.gz: expected the cine's shape .* = \(3, 3, 32, 40\), got \(3, 3, "
        "32, 39",
        r"left out: mnms/G: .*G_sa_gt.nii.gz: expected label ids 0 to 3, got 0, 3, 6, 9",
        r"left out: mnms/I: .*I_sa.nii.gz: expected an image, got a constant in every frame",
        r"left out: mnms/K: K_sa_gt.nii.gz: no K_sa.nii.gz beside it",
        r"used: mnms/B: B_sa.nii.gz: the same images as mnms/A",
        r"used: mnms/C: C_sa_gt.nii.gz: ES has no labels",
        r"used: mnms/D: D_sa_gt.nii.gz: ED has no RV",
        r"used: mnms/D: D_sa_gt.nii.gz: ES has no RV",
        r"used: mnms/E: E_sa_gt.nii.gz: the labels contradict the slice order",
        r"used: mnms/H: H_sa_gt.nii.gz: holds no label",
        r"used: mnms/L: L_sa_gt.nii.gz: the myocardium lies around label 3 \(100% of its border\) rather "
        r"than around label 1 \(0%\): are LV and RV exchanged",
    )
    found = [line.strip() for line in lines[1:]]
    assert all(re.match(pattern, line) for pattern, line in zip(expected, found, strict=True)), found


def test_hearts_far_from_the_crop(tmp_path, write_mnms, beating):
    """Labels in the corner of a large image: the middle beats at pixel 220 of 400, the labels end at 30."""
    cine = np.zeros((400, 400, 2, 2), np.int16)
    cine[0, 0] = 1  # no frame is constant
    cine[218:223, 218:223, :, 1] = 99
    labels = np.zeros(cine.shape, np.uint8)
    labels[20:31, 215:226, :, 0] = 1
    write_mnms("A", cine, labels)
    subjects, _ = dataset.find([tmp_path / "mnms"], tmp_path)
    cines = store.build(subjects, tmp_path / "cache", labels=True)
    (record,) = cines.labels
    distance, reach = record.distance_mm, record.reach_mm
    assert distance == pytest.approx((220 - 25) * 1.5, abs=6) and reach == pytest.approx(
        (220 - 20) * 1.5, abs=6
    )
    (problem,) = (p for p in quality.problems(cines, []) if "reaches" in p.what)
    assert re.search(r"(29\d|30\d) mm .* beyond the 320 mm crop", problem.what)


def test_wrong_usage(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        main([str(tmp_path / "nowhere"), "--cache", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2


def test_real_patients(acdc70, tmp_path, capsys):
    """One of the 70 has the images of another, and at the nominal spacing at least 68 hearts lie within 200
    mm.
    """
    assert main([str(acdc70), "--cache", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "cines: 70 subjects (acdc 70; vendors: unknown 70), 140 frames, 1312 slices" in text
    assert int(re.search(r"(\d+) of 70 within 200 mm", text)[1]) >= 68
    assert "acdc/patient076: patient076_4d.nii.gz: the same images as acdc/patient074" in text
