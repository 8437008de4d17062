import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cmrssp.data import splits
from cmrssp.data.subject import LabelFile, Subject
from cmrssp.errors import UserError


def subjects(count, dataset="mnms", vendors=("A", "B"), **fields):
    return [
        Subject(dataset, f"s{i:04d}", Path("x"), vendor=vendors[i % len(vendors)], **fields)
        for i in range(count)
    ]


def test_every_subject_once_in_60_15_25():
    members = subjects(80)
    split = splits.assign(members, 0)
    assert {part: len(keys) for part, keys in split.items()} == {"train": 48, "validation": 12, "test": 20}
    assert sorted(key for keys in split.values() for key in keys) == sorted(s.key for s in members)


def test_strata_are_kept():
    members = subjects(80, vendors=("A", "B", "C", "D"))
    vendor = {s.key: s.vendor for s in members}
    split = splits.assign(members, 3)
    assert Counter(vendor[k] for k in split["test"]) == {"A": 5, "B": 5, "C": 5, "D": 5}
    assert all(2 <= n <= 4 for n in Counter(vendor[k] for k in split["validation"]).values())


def test_order_of_files_and_paths_do_not_matter_but_the_seed_does():
    members = subjects(40)
    moved = [Subject(s.dataset, s.id, Path("elsewhere"), vendor=s.vendor) for s in reversed(members)]
    assert splits.assign(members, 0) == splits.assign(moved, 0)
    assert splits.assign(members, 0) != splits.assign(members, 1)


def test_full_mnms_gives_15_of_each_vendor_to_the_test():
    members = subjects(345, vendors=("A", "B", "C", "D"))
    vendor = {s.key: s.vendor for s in members}
    split = splits.assign(members, 0)
    assert Counter(vendor[k] for k in split["test"]) == {"A": 15, "B": 15, "C": 15, "D": 15}
    assert (len(split["train"]), len(split["validation"])) == (228, 57)


def test_an_empty_cell_of_the_table_does_not_change_the_rule():
    members = subjects(345, vendors=("A", "B", "C", "D"))
    members[0] = Subject("mnms", "s0000", Path("x"))
    split = splits.assign(members, 0)
    assert (len(split["train"]), len(split["validation"]), len(split["test"])) == (228, 57, 60)


def test_official_test_list_is_kept():
    members = subjects(100, "acdc") + [Subject("acdc", f"t{i}", Path("x"), part="test") for i in range(50)]
    split = splits.assign(members, 0)
    assert split["test"] == sorted(f"acdc/t{i}" for i in range(50))
    assert (len(split["train"]), len(split["validation"])) == (80, 20)


def test_the_few_with_labels_are_spread_and_the_others_train():
    """25 % of 20 labelled test, 20 % of the other 15 validate; also if the others are another data set."""
    few = [replace(s, labels=(LabelFile(Path("x_gt")),)) for s in subjects(20)]
    many = subjects(200)[20:]
    for others in (many, [replace(s, dataset="folder") for s in many]):
        split = splits.assign([*others, *few], 0)
        assert {part: len(keys) for part, keys in split.items()} == {"train": 192, "validation": 3, "test": 5}
        assert {*split["validation"], *split["test"]} < {s.key for s in few}


def test_all_subjects_of_a_patient_are_in_one_part(capsys):
    members = [replace(s, patient=f"p{i // 3}") for i, s in enumerate(subjects(60))]
    members[7] = replace(members[7], part="test")
    split = splits.assign(members, 0)
    assert {f"mnms/s{i:04d}" for i in (6, 7, 8)} <= set(split["test"])
    of = {s.key: s.patient for s in members}
    parts = [{of[key] for key in keys} for keys in split.values()]
    assert sum(map(len, parts)) == 20 and all(parts)
    assert capsys.readouterr().out == ""
    most = [replace(s, patient="p" if i % 3 else s.id, part="") for i, s in enumerate(members)]
    of_p = {s.key for s in most if s.patient == "p"}
    together = [len(of_p & set(keys)) for keys in splits.assign(most, 0).values()]
    assert sorted(together) == [0, 0, 40]
    elsewhere = [*members[:6], replace(members[0], dataset="dicom", part="test")]
    assert {"dicom/s0000", "mnms/s0000", "mnms/s0002"} <= set(splits.assign(elsewhere, 0)["test"])
    members[6] = replace(members[6], part="train")
    splits.assign(members, 0)
    assert "mnms/s0006 (train), mnms/s0007 (test)" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1))])
def test_few_subjects(count, sizes):
    assert tuple(len(keys) for keys in splits.assign(subjects(count), 0).values()) == sizes


def test_subsets_are_nested_and_drawn_by_the_seed():
    keys = [f"mnms/{i}" for i in range(60)]
    drawn = [set(splits.subset(keys, n, 1)) for n in (10, 15, 25, 50)]
    assert [len(d) for d in drawn] == [10, 15, 25, 50]
    assert drawn[0] < drawn[1] < drawn[2] < drawn[3]
    assert splits.subset(keys, 10, 1) != splits.subset(keys, 10, 2)
    assert splits.subset(reversed(keys), 10, 1) == splits.subset(keys, 10, 1)


@pytest.mark.parametrize("n", [0, -1, 61])
def test_impossible_subsets(n):
    with pytest.raises(UserError, match=f"--n-subjects: expected 1 to 60 .*, got {n}"):
        splits.subset([f"{i}" for i in range(60)], n, 0)


def test_a_split_file_decides(tmp_path):
    members = subjects(4)
    file = tmp_path / "split.json"
    file.write_text(
        json.dumps({"train": ["mnms/s0001"], "validation": [], "test": ["mnms/s0000", "mnms/gone"]})
    )
    split = splits.choose(members, split_file=file, split_seed=0)
    assert split == {"train": ["mnms/s0001"], "validation": [], "test": ["mnms/s0000"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected the lists"),
        ("{", "expected the lists"),
        ('{"train": ["a"], "validation": ["a"], "test": []}', "more than once: a"),
        ('{"train": ["a"], "validation": ["b"], "test": []}', "names none of the 4 subjects"),
    ],
)
def test_a_split_file_that_is_wrong_is_refused(tmp_path, content, message):
    file = tmp_path / "split.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        splits.choose(subjects(4), split_file=file, split_seed=0)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["split.json", "split.yaml"])
def test_split_files_as_windows_writes_them(tmp_path, encoding, name):
    text = '{"train": ["mnms/A"], "validation": [], "test": []}' if name == "split.json" else PUBLISHED
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert splits.read(tmp_path / name)["train"][0] in ("mnms/A", "mnms/B0L3Y2")


def inheriting(members, seed=0):
    """The split of these subjects that goes on with that of 40 others."""
    return splits.choose(members, split_file=None, split_seed=seed, inherited=INHERITED)


INHERITED = splits.assign(subjects(40), 7)


def test_an_inherited_split_holds_for_the_subjects_that_it_names(capsys):
    assert inheriting(subjects(40)) == INHERITED
    assert capsys.readouterr().out == ""


def test_subjects_that_an_inherited_split_does_not_name_are_not_used(capsys):
    assert inheriting(subjects(43)) == INHERITED
    assert "3 of 43" in capsys.readouterr().out


def test_an_inherited_split_keeps_fewer_subjects_in_their_parts():
    few = inheriting(subjects(10))
    assert all(set(few[part]) <= set(INHERITED[part]) for part in few) and sum(map(len, few.values())) == 10


def test_an_inherited_split_of_other_subjects_is_drawn_anew():
    others = subjects(20, "acdc")
    assert inheriting(others, seed=5) == splits.assign(others, 5)


def test_parts_that_the_data_set_assigns_are_kept():
    members = subjects(10, "folder")
    members[0] = Subject("folder", "s0000", Path("x"), part="validation")
    members[1] = Subject("folder", "s0001", Path("x"), part="train")
    split = splits.assign(members, 0)
    assert split["validation"] == ["folder/s0000"] and "folder/s0001" in split["train"]
    assert len(split["test"]) == 2  # a quarter of the 8 that are free


PUBLISHED = """"test":
  "mm1":
  - "A1D9Z7"
  - 'A4R4T0'
  "mm2":
  - "281"
train:
  mm1:
  - B0L3Y2
  mm2:
  - 7
  - "8"
valid:
  mm1:
  - D2M5E2
  mm2:
"""


def test_the_published_form_of_a_split(tmp_path):
    file = tmp_path / "split.yaml"
    file.write_text(PUBLISHED)
    assert splits.read(file) == {
        "train": ["mnms/B0L3Y2", "mnms2/007", "mnms2/008"],
        "validation": ["mnms/D2M5E2"],
        "test": ["mnms/A1D9Z7", "mnms/A4R4T0", "mnms2/281"],
    }


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("train:", "training:", 7),
        ("  mm2:\n  - 7", "  acdc:\n  - 7", 10),
        ('  - "281"', "  - {a: 1}", 6),
        ('"test":', "- A1", 1),
        ("  - D2M5E2", "  - !!python/object/apply:os.system [ls]", 15),
    ],
)
def test_anything_else_in_a_yaml_is_refused(tmp_path, old, new, line):
    file = tmp_path / "split.yaml"
    assert old in PUBLISHED
    file.write_text(PUBLISHED.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"split.yaml: .*line {line}:"):
        splits.read(file)


def test_the_published_split_of_the_paper(published_split):
    split = splits.read(published_split / "default-cine-split.yaml")
    assert {part: len(keys) for part, keys in split.items()} == {"train": 296, "validation": 74, "test": 140}
    ten = splits.read(published_split / "default-cine-split-nr10-seed0.yaml")
    assert len(ten["train"]) == 10 and set(ten["train"]) < set(split["train"])
    assert (ten["validation"], ten["test"]) == (split["validation"], split["test"])


def test_mnms2_subjects_that_may_repeat_a_checkpoints_mnms_subjects_get_no_part(capsys):
    members = [
        Subject("mnms2", f"{i}", Path("x"), pathology=disease)
        for i, disease in enumerate(("NOR", "HCM", "LV", "RV", "FALL", "CIA"))
    ]
    known = {"split_file": None, "split_seed": 0, "seen": ["mnms/a"]}
    for split in (splits.choose(members, **known), splits.choose(members, everyone="test", **known)):
        assert sorted(key for keys in split.values() for key in keys) == ["mnms2/3", "mnms2/4", "mnms2/5"]
    assert len(splits.choose(members, everyone="test", split_file=None, split_seed=0)["test"]) == 6
