"""Data sets as they are downloaded, written by hand: which subjects, which labels, which vendors, what is
odd.
"""

import argparse
import csv
import gzip
import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest

from cmrssp.data import dataset, quality, splits, store
from cmrssp.data.subject import USED
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


@pytest.fixture(scope="module")
def mnms(tmp_path_factory, beating):
    """Four subjects as distributed: labelled, with empty labels, with a wrong table, without a row."""
    root = tmp_path_factory.mktemp("mnms") / "MnM"
    _, labels = beating()  # ED is frame 2, ES frame 0
    for i, (id, place) in enumerate(
        {"A0": "Training/Labeled", "B1": "Training/Unlabeled", "C2": "Validation", "D3": "Testing"}.items()
    ):
        save(root / place / id / f"{id}_sa.nii.gz", beating(i)[0])
    save(root / "Training/Labeled/A0/A0_sa_gt.nii.gz", labels)
    save(root / "Training/Unlabeled/B1/B1_sa_gt.nii.gz", np.zeros_like(labels))
    save(root / "Validation/C2/C2_sa_gt.nii.gz", labels)
    table(
        root / "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv",
        MNMS_HEADER,
        "0,A0,Siemens,A,1,2,0,50,HCM,F,170,70",
        "1,B1,,B,2,,,,,,,",
        "2,C2,Canon,D,5,1,0,,NOR,M,,",
        "3,E9,GE,C,4,0,1,,NOR,M,,",
    )
    return stored(root.parent, root)


def test_mnms_subjects_are_described_by_the_table(mnms):
    assert [(s.key, s.vendor, s.pathology, s.ed, s.es) for s in mnms[0].subjects] == [
        ("mnms/A0", "Siemens", "HCM", 2, 0),
        ("mnms/B1", "Philips", "", None, None),  # by the letter, where the name is missing
        ("mnms/C2", "Canon", "NOR", 1, 0),
        ("mnms/D3", "", "", None, None),
    ]


def test_mnms_phases_are_those_of_the_labels(mnms):
    assert [r.phases for r in mnms[0].labels] == [{"ED": 2, "ES": 0}, {}, {"ED": 2, "ES": 0}, {}]
    ((what, done),) = mnms[1]["mnms/C2"]
    assert "ED is frame 2" in what and "says ED 1" in what and done == "used with correction"


def test_mnms_problems(mnms):
    _, problems = mnms
    assert set(problems) == {"mnms/B1", "mnms/C2", "mnms/D3", ""}
    assert problems["mnms/B1"] == [("holds no label", "used")]
    assert [done for _, done in problems["mnms/D3"]] == ["used"]  # no row
    assert problems[""] == [("the table names subjects that have no cine here: E9", "left out")]


@pytest.fixture(scope="module")
def mnms2(tmp_path_factory, beating):
    """Four subjects whose ED and ES images are: exact, rescaled and noisy, those of another heart, without
    ED.
    """
    root, rng = tmp_path_factory.mktemp("mnms2") / "MnM2", np.random.default_rng(3)
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
        root / "Dataset_Information.CSV",
        "SUBJECT_CODE,DISEASE,VENDOR,SCANNER,FIELD",
        "1,NOR,SIEMENS,Avanto,1.5",
        "101,ARR,Philips Medical Systems,Achieva,3.0",
        "210,HCM,GE MEDICAL SYSTEMS,SIGNA,1.5",
        "300,FALL,SIEMENS,Avanto,1.5",
        ",,,,",
        ",,,,",
    )
    return root


@pytest.fixture(scope="module")
def mnms2_stored(mnms2):
    return stored(mnms2.parent, mnms2)


def test_mnms2_subjects_are_described_by_the_table(mnms2_stored):
    assert [(s.key, s.vendor, s.pathology, s.part) for s in mnms2_stored[0].subjects] == [
        ("mnms2/001", "Siemens", "NOR", ""),
        ("mnms2/101", "Philips", "ARR", ""),
        ("mnms2/210", "GE", "HCM", "test"),
        ("mnms2/300", "Siemens", "FALL", "test"),
    ]


def test_mnms2_frames_are_found_by_their_images(mnms2_stored):
    cines, _ = mnms2_stored
    phases = [record.phases for record in cines.labels]
    assert phases[:2] == [{"ED": 2, "ES": 0}] * 2 and phases[2] == {} and len(phases[3]) == 1
    assert (cines.label_volume(1, 2) == 1).sum() == 3 * (np.hypot(*np.mgrid[-22:18, -14:18]) < 8).sum()


def test_mnms2_problems(mnms2_stored):
    _, problems = mnms2_stored
    assert set(problems) == {"mnms2/210", "mnms2/300"}
    assert [(what[:29], done) for what, done in problems["mnms2/210"]] == [
        ("no frame of the cine looks li", "left out")
    ] * 2
    assert "no 300_SA_ED.nii.gz beside it" in problems["mnms2/300"][0][0]


@pytest.fixture
def both(mnms2, tmp_path, beating, write_mnms):
    """One subject of M&Ms and the four of M&Ms-2."""
    write_mnms("A0", beating(7)[0])
    return dataset.find([str(tmp_path / "mnms"), str(mnms2)], tmp_path)[0]


def test_the_overlap_of_mnms2_with_mnms_is_left_out_by_default(both, capsys):
    split = splits.assign(both, 0)
    assert sorted(k for keys in split.values() for k in keys) == ["mnms/A0", "mnms2/101", "mnms2/300"]
    assert "not used: 2 M&Ms-2 subjects with NOR, HCM, LV" in capsys.readouterr().out


def test_the_overlap_can_be_kept(both):
    split = splits.assign(both, 0, keep_overlap=True)
    assert sum(map(len, split.values())) == 5 and {"mnms2/210", "mnms2/300"} <= set(split["test"])


def test_without_mnms_there_is_no_overlap(both):
    alone = splits.assign([s for s in both if s.dataset == "mnms2"], 0)
    assert sum(map(len, alone.values())) == 4 and alone["test"] == ["mnms2/210", "mnms2/300"]


def test_weights_that_saw_mnms2_are_noted_beside_mnms(both, capsys):
    mnms = [s for s in both if s.dataset == "mnms"]
    assert sum(map(len, splits.assign(mnms, 0, seen=["mnms2/101"]).values())) == 1
    assert "M&Ms-2" in capsys.readouterr().out
    for seen in (["acdc/patient001"], ["mnms2/101", "mnms/B9"]):  # both together: the overlap was left out
        splits.assign(mnms, 0, seen=seen)
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def real_size(tmp_path_factory):
    """The subjects of trees like those of 345 M&Ms and 360 M&Ms-2 subjects."""
    top = tmp_path_factory.mktemp("real")
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
            folder = top / "MnM" / ("Testing" if i % 3 else "Training/Labeled") / id
            folder.mkdir(parents=True)
            (folder / f"{id}_sa.nii").write_bytes(image)
            (folder / f"{id}_sa_gt.nii").write_bytes(image)
            rows.append(f"{len(rows)},{id},{vendor},{letter},1,0,0,,{('NOR', 'HCM', 'DCM')[i % 3]},,,")
    table(top / "MnM" / "information.csv", MNMS_HEADER, *rows)
    rows = []
    for code in range(1, 361):
        folder = top / "MnM2" / "dataset" / f"{code:03d}"
        folder.mkdir(parents=True)
        for name in ("CINE", "ED", "ES", "ED_gt", "ES_gt"):
            (folder / f"{code:03d}_SA_{name}.nii").write_bytes(image)
        may_repeat = code <= 100 or 161 <= code <= 175 or 201 <= code <= 280
        disease = ("NOR", "HCM", "LV")[code % 3] if may_repeat else ("ARR", "FALL", "CIA", "TRI")[code % 4]
        rows.append(f"{code:03d},{disease},{('SIEMENS', 'Philips Medical Systems')[code % 2]},X,1.5")
    table(top / "MnM2" / "dataset_information.csv", "SUBJECT_CODE,DISEASE,VENDOR,SCANNER,FIELD", *rows)
    subjects, problems = dataset.find([str(top / "MnM"), str(top / "MnM2")], top)
    assert len(subjects) == 705 and not problems
    return subjects


def test_the_papers_counts(real_size):
    """296 / 74 / 140 (paper, section 2.1)."""
    split = splits.choose(real_size, split_file=None, split_seed=0)
    assert {part: len(keys) for part, keys in split.items()} == {"train": 296, "validation": 74, "test": 140}


def test_the_papers_test_subjects(real_size):
    test = splits.choose(real_size, split_file=None, split_seed=0)["test"]
    vendors = Counter(s.vendor for s in real_size if s.key in test and s.dataset == "mnms")
    assert vendors == {"Siemens": 15, "Philips": 15, "GE": 15, "Canon": 15}
    assert {k for k in test if k.startswith("mnms2")} == {f"mnms2/{code}" for code in range(281, 361)}


def test_the_papers_development_subjects(real_size):
    split = splits.choose(real_size, split_file=None, split_seed=0)
    keys = (*split["train"], *split["validation"])
    codes = {int(key.split("/")[1]) for key in keys if key.startswith("mnms2")}
    assert codes == {*range(101, 161), *range(176, 201)}


def test_the_split_does_not_depend_on_the_order_of_the_subjects(real_size):
    split = splits.choose(real_size, split_file=None, split_seed=0)
    assert splits.choose(real_size[::-1], split_file=None, split_seed=0) == split


@pytest.fixture(scope="module")
def acdc(tmp_path_factory, beating):
    """Three patients: with an affine of zeros and spacing in pixdim alone, without Info.cfg, of the test."""
    root = tmp_path_factory.mktemp("acdc") / "ACDC"
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
    return stored(root.parent, root)


def test_acdc_patients(acdc):
    assert [(s.key, s.pathology, s.ed, s.es, s.part) for s in acdc[0].subjects] == [
        ("acdc/patient001", "MINF", 2, 0, ""),
        ("acdc/patient007", "", None, None, ""),
        ("acdc/patient101", "MINF", 2, 0, "test"),
    ]


def test_acdc_labels_get_our_ids(acdc, beating):
    cines, _ = acdc
    assert all(record.phases == {"ED": 2, "ES": 0} for record in cines.labels)
    assert all((cines.label_volume(i, 0) == 1).sum() == (beating()[1][..., 0] == 1).sum() for i in range(3))


def test_acdc_spacing_is_in_pixdim_where_the_affine_is_empty(acdc):
    cines, problems = acdc
    geometry = cines.cines[0].geometry
    assert geometry.spacing_mm == (1.25, 1.25) and geometry.slice_pitch_mm == 12
    ((what, done),) = problems["acdc/patient001"]
    assert what.startswith("the affine is empty: spacing 1.25 x 1.25 x 12 mm")
    assert done == "used with correction"


def test_acdc_without_info(acdc):
    _, problems = acdc
    assert set(problems) == {"acdc/patient001", "acdc/patient007"}
    ((what, done),) = problems["acdc/patient007"]
    assert "ED and ES are found by the labels" in what and done == "used"


@pytest.fixture(scope="module")
def plain(tmp_path_factory, beating):
    """(the folder, what is stored of it): two cines of one name, 3D and 4D cines and labels, and a table."""
    root = tmp_path_factory.mktemp("plain") / "scans"
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
    return root, *stored(root.parent, root, label_suffix="_seg")


def test_a_plain_folder_and_its_table(plain):
    assert [(s.key, s.vendor, s.pathology, s.ed, s.part) for s in plain[1].subjects] == [
        ("folder/a/rest", "Siemens", "HCM", 2, "train"),
        ("folder/b/rest", "", "", None, ""),
        ("folder/one", "GE", "", None, "test"),
        ("folder/phase", "", "", 2, "validation"),
    ]


def test_cines_of_one_patient_in_a_plain_folder(tmp_path, beating):
    names = ("p1_ED", "p1_es", "p2-frame01", "p2-frame12", "p3", "visit_a", "visit_b", "p5/ED", "p5/ES")
    for name in (*names, "ED/p6", "ES/p6", "b/p1_ED", "b/p7_ES", "red", "p8_sax_t0", "p8_sax_t33", "at_T1"):
        save(tmp_path / f"{name}.nii", beating(1)[0])
    table(tmp_path / "subjects.csv", "subject,patient", "visit_a,p4", "visit_b,p4")
    subjects, _ = dataset.find([str(tmp_path)], tmp_path)
    patients = {s.cine.relative_to(tmp_path).with_suffix("").as_posix(): s.patient for s in subjects}
    assert [patients[name] for name in names] == ["p1", "p1", "p2", "p2", "p3", "p4", "p4", "p5", "p5"]
    assert patients["ED/p6"] == patients["ES/p6"] and patients["red"] == "red"
    assert patients["b/p1_ED"] == "b/p1" and patients["b/p7_ES"] == "b/p7"
    assert patients["p8_sax_t0"] == patients["p8_sax_t33"] == "p8_sax" and patients["at_T1"] == "at_T1"


def test_folders_with_a_few_cines_may_be_patients(tmp_path, beating):
    for name in ("p1/first", "p1/second", "p2/first", "p2/second", "p3/one_ED", "p3/one_ES", "p4/one"):
        save(tmp_path / "in" / f"{name}.nii", beating(1)[0])
    (doubt,) = dataset.find([str(tmp_path / "in")], tmp_path)[1]
    assert doubt.done == USED and "2 folders, such as p1" in doubt.what
    table(tmp_path / "in" / "subjects.csv", "subject,patient", "p1/first,1", "p1/second,1")
    assert not [odd for odd in dataset.find([str(tmp_path / "in")], tmp_path)[1] if "folders" in odd.what]


def test_single_frames_of_a_plain_folder_have_the_phase_of_their_names(tmp_path, beating):
    cine, labels = beating()
    for name, t in (("p1_ED", 2), ("p1_ES", 0), ("ES/p2", 0), ("p3", 0)):
        save(tmp_path / "in" / f"{name}.nii", cine[..., t])
        save(tmp_path / "in" / f"{name}_gt.nii", labels[..., t])
    save(tmp_path / "in" / "es" / "p4.nii", cine)
    save(tmp_path / "in" / "es" / "p4_gt.nii", labels)  # of all frames: the labels say it
    cines = store.build(dataset.find([str(tmp_path / "in")], tmp_path)[0], tmp_path, labels=True)
    phases = {s.id: r.phases for s, r in zip(cines.subjects, cines.labels, strict=True)}
    assert phases == {"p1_ED": {"ED": 0}, "p1_ES": {"ES": 0}, "p2": {"ES": 0}, "p3": {"ED": 0},
                      "p4": {"ED": 2, "ES": 0}}  # fmt: skip
    assert not cines.labels[-1].problems


def test_frames_and_phases_in_a_plain_folder(plain):
    assert [r.shape[0] for r in plain[1].cines] == [3, 3, 1, 3]
    assert [r.phases for r in plain[1].labels] == [{"ED": 2, "ES": 0}, {}, {"ED": 0}, {"ED": 2}]


def test_the_split_of_a_table_is_kept(plain):
    split = splits.assign(plain[1].subjects, 0)
    train = ["folder/a/rest", "folder/b/rest"]
    assert split == {"train": train, "validation": ["folder/phase"], "test": ["folder/one"]}


def test_labels_and_rows_without_a_cine_in_a_plain_folder(plain):
    _, _, problems = plain
    assert problems["folder/lost"] == [("no cine lost.nii.gz beside it", "left out")]
    assert problems[""] == [("the table names subjects that have no cine here: gone", "left out")]


def test_labels_with_another_suffix_are_no_cines(plain, tmp_path):
    message = r"rest_seg.nii.gz: looks like labels of rest; .* --label-suffix=_seg"
    with pytest.raises(UserError, match=message):
        dataset.find([str(plain[0])], tmp_path)


def test_labels_beside_a_stranger_s_summary_are_labels(tmp_path, beating):
    """Label maps of a network have the same names, and summary.json or predictions.json of ours."""
    cine, labels = beating(1)
    save(tmp_path / "cines" / "a.nii.gz", cine)
    save(tmp_path / "cines" / "a_labels.nii.gz", labels)
    for place in ("summary.json", "cines/predictions.json"):
        (tmp_path / place).write_text('{"subjects": 1}')
    (subject,), problems = dataset.find([str(tmp_path / "cines")], tmp_path, "_labels")
    assert [file.path.name for file in subject.labels] == ["a_labels.nii.gz"] and not problems


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


@pytest.fixture
def capitals(tmp_path, beating):
    """A folder of a.NII.GZ with labels and b.NII."""
    for name, voxels in (("a.nii.gz", beating()[0]), ("a_gt.nii.gz", beating()[1]), ("b.nii", beating(1)[0])):
        save(tmp_path / "scans" / name, voxels)
        stem, _, end = name.partition(".")
        (tmp_path / "scans" / name).rename(tmp_path / "scans" / f"{stem}.{end.upper()}")
    return tmp_path / "scans"


def test_names_in_capitals_are_read(capitals, tmp_path, beating):
    cines, _ = stored(tmp_path, capitals)
    assert [(s.key, len(s.labels)) for s in cines.subjects] == [("folder/a", 1), ("folder/b", 0)]
    for i in range(2):
        voxels = beating(i)[0][..., 1]
        assert np.array_equal(np.sort(cines.volume(i, 1), axis=None), np.sort(voxels, axis=None))


def test_names_in_capitals_beside_a_layout_are_named(capitals, tmp_path, beating):
    save(capitals / "c_sa.nii.gz", beating()[0])
    ((subject,), problems) = dataset.find([str(capitals)], tmp_path)
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


def test_subjects_of_a_table_lead_nowhere(tmp_path, beating):
    save(tmp_path / "outside.nii.gz", beating(1)[0])
    save(tmp_path / "plain" / "a.nii.gz", beating(2)[0])
    table(tmp_path / "plain" / "subjects.csv", "subject,vendor", "../outside,GE", "a,GE")
    ((subject,), _) = dataset.find([str(tmp_path / "plain")], tmp_path)
    assert subject.cine == tmp_path / "plain" / "a.nii.gz"


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
        ("stored in other axes than its cine: turned by its affine", "used with correction")
    ]
    assert "mnms/B" not in problems


def test_an_image_of_few_values_is_no_cine(tmp_path, beating):
    cine, labels = beating()
    save(tmp_path / "scans" / "imagesTr" / "a.nii.gz", cine)
    save(tmp_path / "scans" / "labelsTr" / "a_drawn.nii.gz", labels)
    cines, problems = stored(tmp_path, tmp_path / "scans")
    assert [s.key for s in cines.subjects] == ["folder/a"]
    assert "got the values 0, 1, 2, 3 alone: a label map?" in problems["folder/a_drawn"][0][0]


def test_a_suffix_in_capitals_is_another_suffix(tmp_path, beating):
    cine, labels = beating()
    save(tmp_path / "scans" / "a.nii.gz", cine)
    save(tmp_path / "scans" / "a_GT.nii.gz", labels)
    with pytest.raises(UserError, match=r"a_GT.nii.gz: looks like labels of a; .* --label-suffix=_GT"):
        dataset.find([str(tmp_path / "scans")], tmp_path)


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


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("patient001_frame01", "patient001_frame03"), r"patient001_4d\.nii\.gz"),
        (("001_SA_ED", "001_SA_ES"), r"001_SA_CINE\.nii\.gz"),
    ],
)
def test_frames_without_their_cine_are_refused(tmp_path, beating, names, missing):
    """As plain cines the two frames of a patient could land on both sides of the split."""
    cine, labels = beating()
    for name, frame in zip(names, (2, 0), strict=True):
        save(tmp_path / "in" / f"{name}.nii.gz", cine[..., frame])
        save(tmp_path / "in" / f"{name}_gt.nii.gz", labels[..., frame])
    with pytest.raises(UserError, match=f"no {missing}"):
        dataset.find([str(tmp_path / "in")], tmp_path)


def test_frames_without_their_cine_beside_a_cine_are_left_out(tmp_path, beating):
    save(tmp_path / "acdc" / "patient002_4d.nii.gz", beating()[0])
    save(tmp_path / "acdc" / "other" / "patient003_frame01.nii.gz", beating()[0][..., 0])
    ((subject,), problems) = dataset.find([str(tmp_path / "acdc")], tmp_path)
    assert subject.key == "acdc/patient002"
    assert ("acdc/patient003", "left out") in {(p.subject, p.done) for p in problems}


def test_of_two_files_with_one_name_one_is_used(tmp_path, beating):
    for i, end in enumerate(("nii", "nii.gz")):
        save(tmp_path / "acdc" / f"patient002_4d.{end}", beating(i)[0])
    ((subject,), problems) = dataset.find([str(tmp_path / "acdc")], tmp_path)
    assert subject.cine.name == "patient002_4d.nii.gz"
    assert ("patient002_4d.nii", "left out") in {(p.file, p.done) for p in problems}


@pytest.mark.parametrize(
    ("cine", "name", "rows", "message"),
    [
        ("H01_sa", "subjects.csv", ("subject,split", "H01,test"), "no file named as in M&Ms"),
        ("a/H01", "a/subjects.csv", ("subject,split", "H01,test"), r"expected .*in/subjects.csv"),
        ("H01", "Subjects.csv", ("subject,split", "H01,test"), r"Subjects.csv: would not be read"),
        ("001", "subjects.csv", ("subject;split", "1;test"), r"no cine \(1\), .*mind leading zeros"),
    ],
)
def test_a_table_of_splits_is_never_passed_over(tmp_path, beating, cine, name, rows, message):
    save(tmp_path / "in" / f"{cine}.nii.gz", beating()[0])
    table(tmp_path / "in" / name, *rows)
    with pytest.raises(UserError, match=message):
        dataset.find([str(tmp_path / "in")], tmp_path)


def test_the_overlap_cannot_be_left_out_without_diseases(mnms2, tmp_path, beating, write_mnms):
    shutil.copytree(mnms2, tmp_path / "MnM2")
    table(tmp_path / "MnM2" / "Dataset_Information.CSV", "SUBJECT_CODE,DISEASE,VENDOR", "1,NOR,SIEMENS")
    folders = [str(tmp_path / "MnM2"), str(write_mnms("A", *beating(9)))]
    subjects, _ = dataset.find(folders, tmp_path)
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
