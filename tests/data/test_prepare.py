"""What both training scripts and evaluation do before their first batch."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from cmrssp.data.prepare import prepare
from cmrssp.errors import UserError

SPLIT = '{"train": ["mnms/A", "mnms/B"], "validation": ["mnms/C"], "test": ["mnms/D"]}'


class Remembered:
    """A checkpoint that was trained on these subjects."""

    path = Path("unet.pt")

    def __init__(self, trained=(), digests=None):
        self.digests, self.trained = digests or {}, trained

    def seen(self):
        return dict.fromkeys(self.trained, "mim")


@pytest.fixture
def four(write_mnms, beating, tmp_path):
    """four(...) -> `prepare` on the subjects A, B, C, D of M&Ms, A and C of GE, split by SPLIT."""
    for i, id in enumerate("ABCD"):
        folder = write_mnms(id, *beating(i))
    (folder / "t.csv").write_text("External code,VendorName\nA,GE\nB,Canon\nC,GE\nD,Canon\n")
    (tmp_path / "split.json").write_text(SPLIT)

    def run(**options):
        options = {"needed": "train", "split_file": tmp_path / "split.json", **options}
        return prepare([str(folder)], tmp_path / "cache", **options)

    run.folder = folder
    return run


def test_images_of_all_parts(four, capsys):
    prepared = four()
    assert prepared.split == {"train": ["mnms/A", "mnms/B"], "validation": ["mnms/C"], "test": ["mnms/D"]}
    assert [s.id for s in prepared.cines.subjects] == list("ABCD") and prepared.cines.labels is None
    assert prepared.digests.keys() == {"mnms/A", "mnms/B", "mnms/C", "mnms/D"}
    assert "cines: 4 subjects" in capsys.readouterr().out


def test_a_copy_of_a_test_subject_does_not_train(four):
    shutil.copy(four.folder / "D_sa.nii.gz", four.folder / "B_sa.nii.gz")
    prepared = four()
    assert prepared.split == {"train": ["mnms/A"], "validation": ["mnms/C"], "test": ["mnms/D"]}


def test_labels_of_some_parts(four):
    """No label file of a test subject is opened."""
    (four.folder / "D_sa_gt.nii.gz").write_bytes(b"no NIfTI")
    prepared = four(labelled=("train", "validation"))
    assert [s.id for s in prepared.cines.subjects] == list("ABC")
    assert [record.phases for record in prepared.cines.labels] == [{"ED": 2, "ES": 0}] * 3
    assert prepared.split["test"] == ["mnms/D"] and len(prepared.digests) == 4


def test_one_part_alone(four):
    """The others are neither stored nor looked at."""
    (four.folder / "A_sa.nii.gz").write_bytes(b"no NIfTI")
    prepared = four(needed="test", parts=("test",), labelled=("test",))
    assert [s.id for s in prepared.cines.subjects] == ["D"] and prepared.split["train"] == [
        "mnms/A",
        "mnms/B",
    ]


def test_broken_subjects_leave_the_split(four):
    (four.folder / "A_sa.nii.gz").write_bytes(b"no NIfTI")
    with pytest.raises(UserError, match="mnms/A"):
        four()
    assert four(skip_broken=True).split["train"] == ["mnms/B"]


def test_vendors_of_the_needed_part(four):
    assert four(vendors=["GE"]).split["train"] == ["mnms/A"]
    with pytest.raises(UserError, match="Canon, GE"):
        four(vendors=["Siemens"])


def test_a_checkpoint_that_was_trained_on_a_held_out_subject_is_refused(four):
    held_out = ("validation", "test")
    assert four(checkpoints=[Remembered(["mnms/A"])], held_out=held_out)
    with pytest.raises(UserError, match=r"1 of the 1 validation .*mnms/C"):
        four(checkpoints=[Remembered(["mnms/A", "mnms/C"])], held_out=held_out)


def test_a_checkpoint_that_was_trained_on_the_images_of_a_held_out_subject_is_refused(four):
    image = four().digests["mnms/C"]
    checkpoint = Remembered(["other/X"], {"other/X": image})
    with pytest.raises(UserError, match="mnms/C, as other/X"):
        four(checkpoints=[checkpoint], held_out=("validation",))
    assert four(checkpoints=[checkpoint])  # nothing is held out


def test_the_test_patients_of_acdc_alone_cannot_train(tmp_path, beating):
    cine, _ = beating()
    for number in (101, 150):
        folder = tmp_path / "ACDC" / f"patient{number}"
        folder.mkdir(parents=True)
        image = nibabel.Nifti1Image(cine, np.diag([1.5, 1.5, 10, 1]))
        nibabel.save(image, folder / f"patient{number}_4d.nii.gz")
        (folder / "Info.cfg").write_text("Group: NOR\n")
    with pytest.raises(UserError, match=r"0 train.* 2 test.*acdc/patient101.*--split-file"):
        prepare([str(tmp_path / "ACDC")], tmp_path / "cache", needed="train")
