"""The same images under two names, and other images under one name."""

import pytest

from cmrssp.data import copies, dataset, store
from cmrssp.errors import UserError


def test_a_copy_of_a_test_subject_is_not_trained_on(tmp_path, write_mnms, beating, capsys):
    for id, i in (("A", 0), ("B", 0), ("C", 1), ("D", 1), ("E", 2), ("F", 2)):
        folder = write_mnms(id, *beating(i))
    subjects, _ = dataset.find([folder], tmp_path)
    cines = store.build(subjects, tmp_path / "cache", labels=False)
    split = {"train": ["mnms/A", "mnms/C", "mnms/E", "mnms/F"], "validation": ["mnms/D"], "test": ["mnms/B"]}
    cleaned = copies.without_copies(cines, split)
    assert cleaned == {"train": ["mnms/E", "mnms/F"], "validation": ["mnms/D"], "test": ["mnms/B"]}
    said = capsys.readouterr().out
    assert "not used: mnms/A (train), the same images as mnms/B (test)" in said
    assert "not used: mnms/C (train), the same images as mnms/D (validation)" in said


@pytest.fixture
def three_subjects(write_mnms, beating, tmp_path):
    for i, id in enumerate("ABC"):
        folder = write_mnms(id, *beating(i))
    return store.build(dataset.find([folder], tmp_path)[0], tmp_path / "cache", labels=False)


def test_the_images_that_a_checkpoint_knows_are_accepted(three_subjects):
    cines = three_subjects
    copies.refuse_other_images(cines, cines.digests(), ["mnms/A"], cines.index)


def test_other_images_under_a_known_name_are_refused(three_subjects):
    known = {**three_subjects.digests(), "mnms/B": "0" * 16}
    with pytest.raises(UserError, match=r"1 of 3 .* mnms/B"):
        copies.refuse_other_images(three_subjects, known, [], [])


def test_known_images_under_another_name_are_not_held_out(three_subjects):
    known = {"other/X": three_subjects.digests()["mnms/C"]}
    copies.refuse_other_images(three_subjects, known, ["other/X"], ["mnms/B"])
    with pytest.raises(UserError, match=r"1 of 2 .* mnms/C, as other/X"):
        copies.refuse_other_images(three_subjects, known, ["other/X"], ["mnms/B", "mnms/C"])
