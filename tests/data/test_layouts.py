"""Data sets as they are downloaded, written by hand: which subjects, which labels, which vendors, what is
odd.
"""

import argparse
import csv
import gzip
import os
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest

from cmrssp.data import dataset, quality, splits, store
from cmrssp.errors import UserError

AFFINE = np.diag([1.5, 1.5, 10.0, 1.0])


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def table(path: Path, header: str, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")


def stored(tmp_path, *folders, **options):
    """(store, {subject key: its problems as (what, done)}, data-set-wide problems)."""
    subjects, found = dataset.find([str(f) for f in folders], tmp_path, **options)
    cines = store.build(subjects, tmp_path / "cache", labels=True, skip_broken=True, quiet=True)
    problems: dict[str, list] = {}
    for problem in quality.problems(cines, found):
        problems.setdefault(problem.subject, []).append((problem.what, problem.done))
    return cines, problems


MNMS_HEADER = ",External code,VendorName,Vendor,Centre,ED,ES,Age,Pathology,Sex,Height,Weight"


def test_mnms_as_distributed(tmp_path, beating):
    root = tmp_path / "MnM"
    _, labels = beating()  # ED is frame 2, ES frame 0
    for i, (id, place) in enumerate(
        {"A0": "Training/Labeled", "B1": "Training/Unlabeled", "C2": "Validation", "D3": "Testing"}.items()
    ):
        save(root / place / id / f"{id}_sa.nii.gz", beating(i)[0])
    save(root / "Training/Labeled/A0/A0_sa_gt.nii.gz", labels)
    save(root / "Training/Unlabeled/B1/B1_sa_gt.nii.gz", np.zeros_like(labels))  # exists, and is empty
    save(root / "Validation/C2/C2_sa_gt.nii.gz", labels)
    table(
        root / "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv",
        MNMS_HEADER,
        "0,A0,Siemens,A,1,2,0,50,HCM,F,170,70",
        "1,B1,,B,2,,,,,,,",
        "2,C2,Canon,D,5,1,0,,NOR,M,,",
        "3,E9,GE,C,4,0,1,,NOR,M,,",
    )
    cines, problems = stored(tmp_path, root)
    assert [(s.key, s.vendor, s.pathology, s.ed, s.es) for s in cines.subjects] == [
        ("mnms/A0", "Siemens", "HCM", 2, 0),
        ("mnms/B1", "Philips", "", None, None),  # the letter says it where the name is missing
        ("mnms/C2", "Canon", "NOR", 1, 0),
        ("mnms/D3", "", "", None, None),
    ]
    assert [record.phases for record in cines.labels] == [{"ED": 2, "ES": 0}, {}, {"ED": 2, "ES": 0}, {}]
    assert set(problems) == {"mnms/B1", "mnms/C2", "mnms/D3", ""}
    assert problems["mnms/B1"] == [("holds no label", "used")]
    ((what, done),) = problems["mnms/C2"]
    assert "ED is frame 2" in what and "says ED 1" in what and done == "used with correction"
    assert [done for _, done in problems["mnms/D3"]] == ["used"]
    assert problems[""] == [("the table names subjects that have no cine here: E9", "left out")]


@pytest.fixture
def mnms2(tmp_path, beating):
    """Four subjects whose ED and ES images are: exact, rescaled and noisy, those of another heart, without
    ED.
    """
    root, rng = tmp_path / "MnM2", np.random.default_rng(3)
    for code in ("001", "101", "210", "300"):
        cine, labels = beating(int(code))
        frames = {"ED": cine[..., 2], "ES": cine[..., 0]}
        if code == "101":
            frames = {
                k: (v * 0.37 + 11 + rng.normal(0, 2, v.shape)).astype(np.float32) for k, v in frames.items()
            }
        if code == "210":
            frames = {k: rng.integers(0, 99, v.shape).astype(np.int16) for k, v in frames.items()}
        folder = root / "dataset" / code
        save(folder / f"{code}_SA_CINE.nii.gz", cine)
        save(folder / f"{code}_LA_CINE.nii.gz", cine[:, :, :1])
        save(folder / f"{code}_LA_ED_gt.nii.gz", labels[:, :, :1, 2])
        for phase, frame in (("ED", 2), ("ES", 0)):
            if (code, phase) != ("300", "ED"):
                save(folder / f"{code}_SA_{phase}.nii.gz", frames[phase])
            save(folder / f"{code}_SA_{phase}_gt.nii.gz", labels[..., frame])
    table(
        root / "dataset_information.csv",
        "SUBJECT_CODE,DISEASE,VENDOR,SCANNER,FIELD",
        "1,NOR,SIEMENS,Avanto,1.5",
        "101,ARR,Philips Medical Systems,Achieva,3.0",
        "210,HCM,GE MEDICAL SYSTEMS,SIGNA,1.5",
        "300,FALL,SIEMENS,Avanto,1.5",
        ",,,,",
        ",,,,",
    )
    return root


def test_mnms2_frames_are_found_by_their_images(mnms2, tmp_path, beating):
    cines, problems = stored(tmp_path, mnms2)
    assert [(s.key, s.vendor, s.pathology, s.part) for s in cines.subjects] == [
        ("mnms2/001", "Siemens", "NOR", ""),
        ("mnms2/101", "Philips", "ARR", ""),
        ("mnms2/210", "GE", "HCM", "test"),
        ("mnms2/300", "Siemens", "FALL", "test"),
    ]
    phases = [record.phases for record in cines.labels]
    assert phases[:2] == [{"ED": 2, "ES": 0}] * 2 and phases[2] == {} and len(phases[3]) == 1
    assert (cines.label_volume(1, 2) == 1).sum() == 3 * (np.hypot(*np.mgrid[-22:18, -14:18]) < 8).sum()
    assert set(problems) == {"mnms2/210", "mnms2/300"}
    assert [(what[:29], done) for what, done in problems["mnms2/210"]] == [
        ("no frame of the cine looks li", "left out")
    ] * 2
    assert "no 300_SA_ED.nii.gz beside it" in problems["mnms2/300"][0][0]


def test_the_overlap_of_mnms2_with_mnms_is_left_out_by_default(mnms2, tmp_path, beating, write_mnms, capsys):
    write_mnms("A0", beating(7)[0])
    subjects, _ = dataset.find([str(tmp_path / "mnms"), str(mnms2)], tmp_path)
    split = splits.assign(subjects, 0)
    assert sorted(k for keys in split.values() for k in keys) == ["mnms/A0", "mnms2/101", "mnms2/300"]
    assert "not used: 2 M&Ms-2 subjects with NOR, HCM, LV" in capsys.readouterr().out
    split = splits.assign(subjects, 0, keep_overlap=True)
    assert sum(map(len, split.values())) == 5 and {"mnms2/210", "mnms2/300"} <= set(split["test"])
    alone = splits.assign([s for s in subjects if s.dataset == "mnms2"], 0)
    assert sum(map(len, alone.values())) == 4 and alone["test"] == ["mnms2/210", "mnms2/300"]


def test_the_papers_counts_on_a_tree_of_the_real_size(tmp_path):
    """345 M&Ms and 360 M&Ms-2 subjects give 296 / 74 / 140 (paper, section 2.1)."""
    image = nibabel.Nifti1Image(np.zeros((2, 2, 1, 1), np.int16), AFFINE).to_bytes()
    rows = []
    for vendor, letter, count in (
        ("Siemens", "A", 95),
        ("Philips", "B", 125),
        ("GE", "C", 75),
        ("Canon", "D", 50),
    ):
        for i in range(count):
            id = f"{letter}{i:03d}X"
            folder = tmp_path / "MnM" / ("Testing" if i % 3 else "Training/Labeled") / id
            folder.mkdir(parents=True)
            (folder / f"{id}_sa.nii").write_bytes(image)
            (folder / f"{id}_sa_gt.nii").write_bytes(image)
            rows.append(f"{len(rows)},{id},{vendor},{letter},1,0,0,,{('NOR', 'HCM', 'DCM')[i % 3]},,,")
    table(tmp_path / "MnM" / "information.csv", MNMS_HEADER, *rows)
    rows = []
    for code in range(1, 361):
        folder = tmp_path / "MnM2" / "dataset" / f"{code:03d}"
        folder.mkdir(parents=True)
        for name in ("CINE", "ED", "ES", "ED_gt", "ES_gt"):
            (folder / f"{code:03d}_SA_{name}.nii").write_bytes(image)
        may_repeat = code <= 100 or 161 <= code <= 175 or 201 <= code <= 280
        disease = ("NOR", "HCM", "LV")[code % 3] if may_repeat else ("ARR", "FALL", "CIA", "TRI")[code % 4]
        rows.append(f"{code:03d},{disease},{('SIEMENS', 'Philips Medical Systems')[code % 2]},X,1.5")
    table(tmp_path / "MnM2" / "dataset_information.csv", "SUBJECT_CODE,DISEASE,VENDOR,SCANNER,FIELD", *rows)
    subjects, problems = dataset.find([str(tmp_path / "MnM"), str(tmp_path / "MnM2")], tmp_path)
    assert len(subjects) == 705 and not problems
    split = splits.choose(subjects, split_file=None, split_seed=0)
    assert {part: len(keys) for part, keys in split.items()} == {"train": 296, "validation": 74, "test": 140}
    vendor = {s.key: s.vendor for s in subjects}
    of_mnms = [key for key in split["test"] if key.startswith("mnms/")]
    assert Counter(vendor[key] for key in of_mnms) == {"Siemens": 15, "Philips": 15, "GE": 15, "Canon": 15}
    assert {k for k in split["test"] if k not in of_mnms} == {f"mnms2/{code}" for code in range(281, 361)}
    developed = {
        int(k.split("/")[1]) for p in ("train", "validation") for k in split[p] if k.startswith("mnms2")
    }
    assert developed == {*range(101, 161), *range(176, 201)}
    # the same tree elsewhere, its files found in another order, gives the same split
    assert splits.choose(subjects[::-1], split_file=None, split_seed=0) == split


def test_acdc(tmp_path, beating):
    root = tmp_path / "ACDC"
    for number, i in ((1, 0), (101, 1), (7, 2)):
        cine, labels = beating(i)
        folder = root / ("testing" if number > 100 else "training") / f"patient{number:03d}"
        save(folder / f"patient{number:03d}_4d.nii.gz", cine)
        for frame in (2, 0):
            theirs = np.choose(labels[..., frame], (0, 3, 2, 1)).astype(np.uint8)
            save(folder / f"patient{number:03d}_frame{frame + 1:02d}.nii.gz", cine[..., frame])
            save(folder / f"patient{number:03d}_frame{frame + 1:02d}_gt.nii.gz", theirs)
        if number != 7:
            (folder / "Info.cfg").write_text("ED: 3\nES: 1\nGroup: MINF\nHeight: 184.0\nNbFrame: 3\n")
    path = root / "training/patient001/patient001_4d.nii.gz"
    image = nibabel.load(path)
    image.header.set_zooms((1.25, 1.25, 12.0, 0.03))
    image.header["sform_code"], image.header["qform_code"] = 1, 0
    for row in ("srow_x", "srow_y", "srow_z"):
        image.header[row] = 0
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[: len(image.header.binaryblock)] = image.header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)))  # an affine of zeros, spacing in pixdim only
    cines, problems = stored(tmp_path, root)
    assert [(s.key, s.pathology, s.ed, s.es, s.part) for s in cines.subjects] == [
        ("acdc/patient001", "MINF", 2, 0, ""),
        ("acdc/patient007", "", None, None, ""),
        ("acdc/patient101", "MINF", 2, 0, "test"),
    ]
    assert all(record.phases == {"ED": 2, "ES": 0} for record in cines.labels)
    assert all((cines.label_volume(i, 0) == 1).sum() == (beating()[1][..., 0] == 1).sum() for i in range(3))
    assert cines.cines[0].geometry.spacing_mm == (1.25, 1.25) and cines.cines[0].geometry.slice_pitch_mm == 12
    assert set(problems) == {"acdc/patient001", "acdc/patient007"}
    assert problems["acdc/patient007"] == [
        ("missing or empty: ED and ES are found by the labels alone", "used")
    ]
    ((what, done),) = problems["acdc/patient001"]
    assert (
        what.startswith("the affine is empty: spacing 1.25 x 1.25 x 12 mm") and done == "used with correction"
    )


def test_a_plain_folder(tmp_path, beating):
    root = tmp_path / "scans"
    cine, labels = beating()
    save(root / "a" / "rest.nii.gz", cine)
    save(root / "a" / "rest_seg.nii.gz", labels)
    save(root / "b" / "rest.nii", beating(1)[0])
    save(root / "b" / "one.nii.gz", beating(2)[0][..., 0])
    save(root / "b" / "one_seg.nii.gz", labels[..., 0])
    save(root / "b" / "phase.nii.gz", beating(4)[0])
    save(root / "b" / "phase_seg.nii.gz", labels[..., 2])
    save(root / "lost_seg.nii.gz", labels)
    (root / "._a.nii.gz").write_bytes(b"what a Mac leaves behind")
    table(
        root / "subjects.csv",
        "subject;vendor;pathology;ed;es;split",
        "a/rest;SIEMENS;HCM;2;0;train",
        "one;GE;;;;test",
        "phase;;;2;;val",
        "gone;;;;;",
    )
    cines, problems = stored(tmp_path, root, label_suffix="_seg")
    assert [(s.key, s.vendor, s.pathology, s.ed, s.part) for s in cines.subjects] == [
        ("folder/a/rest", "Siemens", "HCM", 2, "train"),
        ("folder/b/rest", "", "", None, ""),
        ("folder/one", "GE", "", None, "test"),
        ("folder/phase", "", "", 2, "validation"),
    ]
    assert [r.shape[0] for r in cines.cines] == [3, 3, 1, 3]
    assert [r.phases for r in cines.labels] == [{"ED": 2, "ES": 0}, {}, {"ED": 0}, {"ED": 2}]
    split = splits.assign(cines.subjects, 0)
    assert split == {
        "train": ["folder/a/rest", "folder/b/rest"],
        "validation": ["folder/phase"],
        "test": ["folder/one"],
    }
    assert problems["folder/lost"] == [("no cine lost.nii.gz beside it", "left out")]
    assert problems[""] == [("the table names subjects that have no cine here: gone", "left out")]
    with pytest.raises(
        UserError, match=r"rest_seg.nii.gz: looks like labels of rest; .* --label-suffix _seg"
    ):
        dataset.find([str(root)], tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("subjects,ed", "a,1"), "got no column 'subject'"),
        (
            ("subject,split", "a,training"),
            "expected train, validation, test or nothing as split of a, got training",
        ),
        (("subject,vendor", "a,GE", "b,GE", "a,Siemens"), "expected one row a subject, got several of a"),
    ],
)
def test_a_table_that_is_wrong(tmp_path, beating, rows, message):
    save(tmp_path / "scans" / "a.nii.gz", beating()[0])
    table(tmp_path / "scans" / "subjects.csv", *rows)
    with pytest.raises(UserError, match=message):
        dataset.find([str(tmp_path / "scans")], tmp_path)


def test_labels_of_one_frame_need_to_say_which(tmp_path, beating):
    cine, labels = beating()
    save(tmp_path / "scans" / "a.nii.gz", cine)
    save(tmp_path / "scans" / "a_gt.nii.gz", labels[..., 0])
    cines, problems = stored(tmp_path, tmp_path / "scans")
    assert not cines.subjects and "expected labels of all 3 frames" in problems["folder/a"][0][0]


def test_the_same_subject_twice(tmp_path, beating):
    for folder in ("one", "two"):
        save(tmp_path / folder / "a.nii.gz", beating()[0])
    with pytest.raises(UserError, match=r"folder/a .* more than once .*one/a.nii.gz.*two/a.nii.gz"):
        dataset.find([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path)


def test_names_in_capitals(tmp_path, beating):
    """Cines and labels in a plain folder; beside a layout that is known they are named."""
    cine, labels = beating()
    other, _ = beating(1)
    for name, voxels in (("a.nii.gz", cine), ("a_gt.nii.gz", labels), ("b.nii", other)):
        save(tmp_path / "scans" / name, voxels)
        stem, _, end = name.partition(".")
        (tmp_path / "scans" / name).rename(tmp_path / "scans" / f"{stem}.{end.upper()}")
    cines, _ = stored(tmp_path, tmp_path / "scans")
    assert [(s.key, len(s.labels)) for s in cines.subjects] == [("folder/a", 1), ("folder/b", 0)]
    for i, voxels in enumerate((cine, other)):
        assert np.array_equal(np.sort(cines.volume(i, 1), axis=None), np.sort(voxels[..., 1], axis=None))
    save(tmp_path / "scans" / "c_sa.nii.gz", cine)
    ((subject,), problems) = dataset.find([str(tmp_path / "scans")], tmp_path)
    assert subject.key == "mnms/c"
    assert any("a.NII.GZ, a_gt.NII.GZ, b.NII" in problem.what for problem in problems)


def test_a_linked_data_set_and_a_cell_with_a_comma(tmp_path, beating, write_mnms):
    folder = write_mnms("A", *beating())
    with open(folder / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["", "External code", "VendorName", "Pathology"], [0, "A", "GE, old", "X"]]
        )
    (tmp_path / "linked").symlink_to(folder)
    ((subject,), _) = dataset.find([str(tmp_path / "linked")], tmp_path)
    assert (subject.vendor, subject.pathology) == ("GE", "X")


def test_ids_of_a_table_lead_nowhere(tmp_path, beating, write_mnms):
    """A row names subjects; which files are read, the folder says."""
    save(tmp_path / "outside_sa.nii.gz", beating(1)[0])
    folder = write_mnms("A", *beating())
    (folder / "t.csv").write_text(",External code,VendorName\n0,../outside,GE\n1,A,GE\n2,/etc/passwd,GE\n")
    ((subject,), problems) = dataset.find([str(folder)], tmp_path)
    assert subject.key == "mnms/A" and subject.cine.parent == folder
    assert problems[0].what.endswith("no cine here: ../outside, /etc/passwd")
    plain = tmp_path / "plain"
    save(plain / "a.nii.gz", beating(2)[0])
    table(plain / "subjects.csv", "subject,vendor", "../outside_sa,GE", "a,GE")
    assert [s.cine for s in dataset.find([str(plain)], tmp_path)[0]] == [plain / "a.nii.gz"]


@pytest.mark.parametrize("swap", [False, True])
def test_labels_stored_in_other_axes_than_their_cine(tmp_path, beating, swap):
    """The same grid, columns reversed (and axes swapped), with the affine that says so; one that says
    nothing.
    """
    cine, labels = beating()
    save(tmp_path / "in" / "mnms" / "A_sa.nii.gz", cine)
    turned, affine = labels[::-1], AFFINE @ np.diag([-1, 1, 1, 1])
    affine[0, 3] = 1.5 * (cine.shape[0] - 1)
    if swap:
        turned, affine = turned.transpose(1, 0, 2, 3), affine[:, [1, 0, 2, 3]]
    save(tmp_path / "in" / "mnms" / "A_sa_gt.nii.gz", turned, affine)
    save(tmp_path / "in" / "mnms" / "B_sa.nii.gz", beating(1)[0])
    save(
        tmp_path / "in" / "mnms" / "B_sa_gt.nii.gz", labels, np.eye(4)
    )  # its affine is lost: the array decides
    cines, problems = stored(tmp_path, tmp_path / "in")
    for i in (0, 1):
        back = cines.cines[i].geometry.from_canonical(cines.label_volume(i, 2)[None])[..., 0]
        assert (back == labels[..., 2]).all()
    assert problems["mnms/A"] == [
        ("A_sa_gt.nii.gz is stored in other axes than its cine: turned by its affine", "used with correction")
    ]
    assert "mnms/B" not in problems


def test_what_looks_like_labels_is_no_cine(tmp_path, beating):
    cine, labels = beating()
    root = tmp_path / "scans"
    save(root / "imagesTr" / "a.nii.gz", cine)
    save(root / "labelsTr" / "a_drawn.nii.gz", labels)
    cines, problems = stored(tmp_path, root)
    assert [s.key for s in cines.subjects] == ["folder/a"]
    assert "got the values 0, 1, 2, 3 alone: a label map?" in problems["folder/a_drawn"][0][0]
    save(root / "imagesTr" / "a_GT.nii.gz", labels)
    with pytest.raises(UserError, match=r"a_GT.nii.gz: looks like labels of a; .* --label-suffix _GT"):
        dataset.find([str(root)], tmp_path)


def test_files_beside_a_layout_are_named(tmp_path, beating):
    save(tmp_path / "in" / "A_sa.nii.gz", beating()[0])
    save(tmp_path / "in" / "sub" / "other.nii.gz", beating(1)[0])
    subjects, problems = dataset.find([str(tmp_path / "in")], tmp_path)
    said = "not named as in the layouts found beside them: other.nii.gz"
    assert any(said in p.what for p in problems)
    cines = store.build(subjects, tmp_path / "cache", labels=False)
    assert said in quality.summary(cines, problems).splitlines()[3]


def test_a_long_name_in_other_letters(tmp_path, beating):
    """78 letters of three bytes: with the hash behind it, too long a name for a file."""
    save(tmp_path / "in" / f"{'心' * 78}.nii.gz", beating()[0])
    cines, _ = stored(tmp_path, tmp_path / "in")
    assert [s.id for s in cines.subjects] == ["心" * 78]


def test_vendors_as_they_are_typed():
    from cmrssp.cli.flags import VendorNames
    from cmrssp.data.subject import vendor_name

    parser = argparse.ArgumentParser()
    parser.add_argument("--vendors", action=VendorNames, nargs="+")
    for words in (["A+B"], ["siemens,PHILIPS"], ["B", "A"]):
        assert parser.parse_args(["--vendors", *words]).vendors == ["Philips", "Siemens"]
    assert [vendor_name(n) for n in ("GE MEDICAL SYSTEMS", "TOSHIBA_MEC", "d", "B. Braun", "Gerät")] == [
        "GE", "Canon", "Canon", "B. Braun", "Gerät",
    ]  # fmt: skip


def test_frames_without_their_cine_are_no_subjects(tmp_path, beating):
    """As plain cines the two frames of a patient could land on both sides of the split."""
    cine, labels = beating()
    for root, names in (("acdc", ("frame01", "frame03")), ("mnms2", ("SA_ED", "SA_ES"))):
        for name, frame in zip(names, (2, 0), strict=True):
            stem = f"patient001_{name}" if root == "acdc" else f"001_{name}"
            save(tmp_path / root / f"{stem}.nii.gz", cine[..., frame])
            save(tmp_path / root / f"{stem}_gt.nii.gz", labels[..., frame])
    with pytest.raises(UserError, match=r"no patient001_4d\.nii\.gz"):
        dataset.find([str(tmp_path / "acdc")], tmp_path)
    with pytest.raises(UserError, match=r"no 001_SA_CINE\.nii\.gz"):
        dataset.find([str(tmp_path / "mnms2")], tmp_path)
    save(tmp_path / "acdc" / "patient002_4d.nii.gz", cine)
    save(tmp_path / "acdc" / "patient002_4d.nii", beating(1)[0])
    save(tmp_path / "acdc" / "other" / "patient003_frame01.nii.gz", cine[..., 0])
    subjects, problems = dataset.find([str(tmp_path / "acdc")], tmp_path)
    assert [s.key for s in subjects] == ["acdc/patient002"]
    said = {(p.subject, p.what) for p in problems if p.done == "left out"}
    assert said >= {
        ("acdc/patient002", "not used, patient002_4d.nii.gz is"),
        ("acdc/patient003", "no patient003_4d.nii.gz beside it"),
    }


def test_a_table_of_splits_is_never_passed_over(tmp_path, beating):
    rows = ("subject,split", "H01,test", "H02,test")

    def refused(root, message):
        with pytest.raises(UserError, match=message):
            dataset.find([str(root)], tmp_path)

    for name in ("H01", "H02", "H03"):
        save(tmp_path / "own" / f"{name}_sa.nii.gz", beating()[0])
        save(tmp_path / "two" / "a" / f"{name}.nii.gz", beating()[0])
        save(tmp_path / "capital" / f"{name}.nii.gz", beating()[0])
        save(tmp_path / "zeros" / f"0{name[1:]}.nii.gz", beating()[0])
    table(tmp_path / "own" / "subjects.csv", *rows)
    table(tmp_path / "two" / "a" / "subjects.csv", *rows)
    table(tmp_path / "capital" / "Subjects.csv", *rows)
    table(tmp_path / "zeros" / "subjects.csv", "subject;split", "1;test", "002;train")
    refused(tmp_path / "own", r"own/subjects.csv: would not be read, .* no file named as in M&Ms")
    refused(tmp_path / "two", r"a/subjects.csv: would not be read, .* expected .*two/subjects.csv")
    refused(tmp_path / "capital", r"Subjects.csv: would not be read")
    refused(tmp_path / "zeros", r"gives a split to subjects that have no cine \(1\), .*mind leading zeros")
    subjects, _ = dataset.find([str(tmp_path / "two" / "a")], tmp_path)
    assert [s.part for s in subjects] == ["test", "test", ""]


def test_the_overlap_cannot_be_left_out_without_diseases(mnms2, tmp_path, beating, write_mnms):
    subjects, _ = dataset.find([str(mnms2), str(write_mnms("A", *beating(9)))], tmp_path)
    splits.assign(subjects, 0)
    table(mnms2 / "dataset_information.csv", "SUBJECT_CODE,DISEASE,VENDOR", "1,NOR,SIEMENS")
    subjects, _ = dataset.find([str(mnms2), str(write_mnms("A", *beating(9)))], tmp_path)
    with pytest.raises(UserError, match=r"3 M&Ms-2 subjects have no DISEASE .* say --keep-overlap"):
        splits.assign(subjects, 0)
    assert sum(map(len, splits.assign(subjects, 0, keep_overlap=True).values())) == 5


def test_a_cache_among_the_data_is_no_data(tmp_path, beating):
    save(tmp_path / "in" / "own.nii.gz", beating()[0])
    save(tmp_path / "in" / "cache" / "phantom-1" / "X_sa.nii.gz", beating(1)[0])
    subjects, _ = dataset.find([str(tmp_path / "in")], tmp_path / "in" / "cache")
    assert [s.key for s in subjects] == ["folder/own"]


@pytest.mark.parametrize("text", [
    "subject,vendor\r\na,GE\r\n", "\nsep=;\nsubject;vendor\na;GE\n", '"Subject"\t"Vendor"\n"a"\t"GE"\n',
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_as_spreadsheets_write_them(tmp_path, beating, text, encoding):
    save(tmp_path / "scans" / "a.nii.gz", beating()[0])
    (tmp_path / "scans" / "subjects.csv").write_bytes(text.encode(encoding))
    (subject,), problems = dataset.find([str(tmp_path / "scans")], tmp_path)
    assert subject.vendor == "GE" and not problems


def test_stray_labels_are_no_phase(tmp_path, beating):
    """ED in frame 2, ES in frame 0, and one voxel in frame 1: the smallest blood pool of all."""
    cine, labels = beating()
    labels[..., 1] = 0
    labels[20, 16, 1, 1] = 1
    save(tmp_path / "in" / "A_sa.nii.gz", cine)
    save(tmp_path / "in" / "A_sa_gt.nii.gz", labels)
    cines, problems = stored(tmp_path, tmp_path / "in")
    assert cines.labels[0].phases == {"ED": 2, "ES": 0} and cines.labels[0].frames == (0, 2)
    assert ("frame 1 lacks LV or MYO, others have both: not used", "left out") in problems["mnms/A"]


def test_one_labelled_frame_that_the_table_does_not_name(tmp_path, beating):
    """Frame 2 has labels. A table that counts from 1 says ES 3, another one ED 1 and ES 3."""
    cine, labels = beating()
    labels[..., :2] = 0
    for name in ("a", "b"):
        save(tmp_path / "in" / f"{name}.nii.gz", cine)
        save(tmp_path / "in" / f"{name}_gt.nii.gz", labels)
    table(tmp_path / "in" / "subjects.csv", "subject,ed,es", "a,0,3", "b,1,3")
    cines, problems = stored(tmp_path, tmp_path / "in")
    assert [record.phases for record in cines.labels] == [{"ES": 2}, {"ED": 2}]
    for name, numbers, phase in (("a", "ED 0 and ES 3", "ES"), ("b", "ED 1 and ES 3", "ED")):
        what = f"{phase} is frame 2 by the labels, the data set says {numbers} (counted from 0)"
        assert (what, "used with correction") in problems[f"folder/{name}"]


def test_labels_beside_the_grid_of_their_cine_are_said(tmp_path, beating):
    cine, labels = beating()
    shifted = AFFINE.copy()
    shifted[0, 3] = 30
    save(tmp_path / "in" / "A_sa.nii.gz", cine)
    save(tmp_path / "in" / "A_sa_gt.nii.gz", labels, shifted)
    _, problems = stored(tmp_path, tmp_path / "in")
    ((what, done),) = problems["mnms/A"]
    assert "its first voxel is at 20.0, 0.0, 0.0 there" in what
    assert done == "used"


def test_labels_follow_the_qform_where_their_cine_does(tmp_path, beating):
    """An identity sform beside a true qform, and labels stored mirrored along x, as their qform says."""
    cine, labels = beating()
    mirror = np.diag([-1.0, 1, 1, 1])
    mirror[0, 3] = cine.shape[0] - 1

    def save_with_forms(name: str, array: np.ndarray, qform: np.ndarray) -> None:
        image = nibabel.Nifti1Image(array, None)
        image.header.set_zooms((1.5, 1.5, 10.0, 1.0))
        image.set_qform(qform, 1)
        image.set_sform(np.eye(4), 1)
        (tmp_path / "in").mkdir(exist_ok=True)
        nibabel.save(image, tmp_path / "in" / name)

    save_with_forms("a.nii.gz", cine, AFFINE)
    save_with_forms("a_gt.nii.gz", labels[::-1], AFFINE @ mirror)
    cines, _ = stored(tmp_path, tmp_path / "in")
    assert cines.cines[0].geometry.spacing_mm == (1.5, 1.5)
    back = cines.cines[0].geometry.from_canonical(cines.label_volume(0, 2)[None])[..., 0]
    assert (back == labels[..., 2]).all()


def test_names_from_a_mac_beside_a_table_from_elsewhere(tmp_path, beating):
    """The file's name is decomposed (u and a combining diaeresis), the table's composed."""
    cine, labels = beating()
    decomposed = unicodedata.normalize("NFD", "Müller")
    assert len(decomposed) == 7
    save(tmp_path / "in" / f"{decomposed}.nii.gz", cine)
    save(tmp_path / "in" / f"{decomposed}_gt.nii.gz", labels)
    (tmp_path / "in" / "subjects.csv").write_text("subject,vendor,split\nMüller,GE,test\n", encoding="utf-8")
    ((subject,), problems) = dataset.find([str(tmp_path / "in")], tmp_path)
    assert (subject.id, subject.vendor, subject.part, len(subject.labels)) == ("Müller", "GE", "test", 1)
    assert problems == []


def test_mnms_names_from_a_mac(tmp_path, beating):
    cine, labels = beating()
    decomposed = unicodedata.normalize("NFD", "Müller")
    save(tmp_path / "in" / f"{decomposed}_sa.nii.gz", cine)
    save(tmp_path / "in" / f"{decomposed}_sa_gt.nii.gz", labels)
    (tmp_path / "in" / "t.csv").write_text("External code,VendorName\nMüller,GE\n", encoding="utf-8")
    ((subject,), problems) = dataset.find([str(tmp_path / "in")], tmp_path)
    assert (subject.id, subject.vendor, len(subject.labels)) == ("Müller", "GE", 1) and problems == []


def test_a_table_in_cp1252(tmp_path, beating):
    save(tmp_path / "in" / "Müller.nii.gz", beating()[0])
    (tmp_path / "in" / "subjects.csv").write_bytes("subject,vendor\nMüller,GE\n".encode("cp1252"))
    ((subject,), problems) = dataset.find([str(tmp_path / "in")], tmp_path)
    assert subject.vendor == "GE" and problems == []


@pytest.mark.parametrize("place", ["", "below/"])
def test_a_prediction_needs_no_split(tmp_path, beating, place):
    """A word that is no part, or a table that is not on top."""
    save(tmp_path / "in" / "below" / "a.nii.gz", beating()[0])
    table(tmp_path / "in" / f"{place}subjects.csv", "subject,vendor,split", "a,GE,holdout")
    with pytest.raises(UserError):
        dataset.find([str(tmp_path / "in")], tmp_path)
    ((subject,), _) = dataset.find([str(tmp_path / "in")], tmp_path, ignore_split=True)
    assert subject.part == ""


def test_a_user_without_a_home_folder_has_a_cache(monkeypatch):
    """As in a container that runs under a bare user id."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert dataset.default_cache().is_relative_to(tempfile.gettempdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path, beating):
    save(tmp_path / "in" / "a.nii.gz", beating()[0])
    (tmp_path / "file").write_bytes(b"")
    subjects, _ = dataset.find([str(tmp_path / "in")], tmp_path / "file")
    for use in (
        lambda: store.build(subjects, tmp_path / "file", labels=False),
        lambda: dataset.find(["phantom"], tmp_path / "file"),
    ):
        with pytest.raises(UserError, match="--cache"):
            use()
