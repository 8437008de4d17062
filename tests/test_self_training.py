"""Self-training: whose predicted label maps are taken, how they are mixed, and what is refused."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_resume import Interrupting, assert_same

import finetune
from cmrssp.data import dataset, splits, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.errors import UserError
from cmrssp.evaluation import label_maps, scoring
from cmrssp.runs.signals import Stopped
from cmrssp.weights import checkpoints
from cmrssp.weights.checkpoints import Checkpoint
from cmrssp.weights.provenance import Provenance

TINY = ["--channels", "4", "8", "8", "--image-size", "32", "--spacing", "6", "--epochs", "1"]
CONFIG = {"channels": [4], "image_size": 32, "spacing_mm": 6.0, "classes": ["LV", "MYO", "RV"]}


@pytest.fixture
def loader(write_mnms, beating, tmp_path):
    """loader(**options): batches of eight; A and C have six labelled slices each, of B one frame of three
    slices is predicted.
    """
    for i, id in enumerate("ABC"):
        folder = write_mnms(id, *beating(i))
    cines = store.build(dataset.find([folder], tmp_path)[0], tmp_path / "cache", labels=True)
    slices = Slices(cines, ["mnms/A", "mnms/C"], phases="both", predicted={"mnms/B": [2]})
    common = {"batch_size": 8, "seed": 1, "labelled": True, "device": torch.device("cpu")}
    return lambda **options: Batches(cines, slices, **common, **options)


def test_predicted_slices_follow_the_labelled_ones(loader):
    slices = loader().slices
    places = [slices.locate(n) for n in range(len(slices))]
    assert [p[:2] for p in places] == [(0, 0)] * 3 + [(0, 2)] * 3 + [(2, 0)] * 3 + [(2, 2)] * 3 + [(1, 2)] * 3


def test_every_batch_has_its_share_of_predicted_slices(loader):
    batches = loader(predicted_share=0.25)
    kinds = [(batch["subject"] == 1).tolist() for batch in batches.epochs(0, 4)]
    assert len(batches) == 1 and [sum(kind) for kind in kinds] == [2] * 4
    assert len({tuple(kind) for kind in kinds}) > 1  # mixed


def test_a_share_leaves_the_number_of_steps_and_repeats_the_rarer_kind(loader):
    batches = loader(predicted_share=0.75)
    (batch,) = batches.epochs(0, 1)
    places = [(int(s), float(p)) for s, p in zip(batch["subject"], batch["position"], strict=True)]
    predicted = [p for s, p in places if s == 1]
    assert len(predicted) == 6 and {predicted.count(p) for p in predicted} == {2}


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_share_that_leaves_one_kind_out_is_refused(loader, share):
    with pytest.raises(UserError, match="--predicted-share"):
        loader(predicted_share=share)


def test_weights_have_a_mean_of_1(loader):
    """Six slices of weight 1 and two of 1/2 have the mean 7/8."""
    (batch,) = loader(predicted_share=0.25, predicted_weight=0.5).epochs(0, 1)
    expected = np.where(batch["subject"] == 1, 4 / 7, 8 / 7)
    assert batch["weight"].numpy() == pytest.approx(expected)


def test_a_predicted_slice_weighs_what_was_asked_in_every_batch(loader):
    """Of 15 slices 3 weigh 1/2: the mean is 9/10, also where a batch has other parts of them."""
    batches = loader(predicted_weight=0.5)
    counts = set()
    for batch in batches.epochs(0, 8):
        predicted = batch["subject"] == 1
        counts.add(int(predicted.sum()))
        assert batch["weight"].numpy() == pytest.approx(np.where(predicted, 5 / 9, 10 / 9))
    assert len(counts) > 1


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def maps(phantom_folder, cache, tmp_path, monkeypatch):
    """(store, split, write(**changes of the teacher's provenance)); the folder `maps` gets the true labels of
    all subjects as if a network had predicted them, with one good frame each.
    """
    monkeypatch.chdir(tmp_path)
    Path("cache").symlink_to(cache)
    subjects, _ = dataset.find([str(phantom_folder)], cache)
    cines = store.build(subjects, cache, labels=True)
    split = splits.assign(subjects, 0)
    Path("maps").mkdir()
    for subject in subjects:
        shutil.copy(subject.labels[0].path, f"maps/{subject.file_name}{dataset.PREDICTED}")
    named = zip(subjects, cines.cines, cines.labels, strict=True)
    found = {s.file_name: {"digest": cine.digest, "frames": [labels.ed]} for s, cine, labels in named}

    def write(cines_written=found, **changes) -> None:
        origin = {"method": "segmentation", "data": [str(phantom_folder)], "split": split, "split_seed": 0,
                  "seed": 0, "subjects": split["train"][:1], "digests": cines.digests()}  # fmt: skip
        teacher = Checkpoint(Path("unet.pt"), {}, CONFIG, Provenance(**{**origin, **changes}))
        label_maps.write(Path("maps"), cines_written, [teacher], {})

    write()
    return cines, split, write


def train(*words, out="student") -> Checkpoint:
    """A student with true labels of one subject; data and split are the teacher's."""
    common = ["--predicted", "maps", "--cache", "cache", *TINY, "--batch-size", "4", "--n-subjects", "1"]
    assert finetune.main([*common, "--out", out, *words]) == 0
    return checkpoints.load(out)


def test_a_student_learns_from_training_subjects_alone(maps):
    cines, split, _ = maps
    student = train()
    origin = student.provenance
    (true,) = origin.subjects
    assert {true, *origin.predicted} == set(split["train"]) == set(student.seen())
    assert origin.labels[true] == cines.digests(labels=True)[true] and true not in origin.predicted
    depths = {key: cines.cines[cines.index[key]].shape[1] for key in split["train"]}
    assert origin.slices == 2 * depths[true] + sum(depths[key] for key in origin.predicted)
    arm = scoring.origin(student)["arm"]
    assert arm["predicted"] and arm["n_subjects"] == len({true, split["train"][0]})  # and the teacher's
    assert arm["pretraining"] == "scratch" and not arm["all_subjects"]


def test_a_student_takes_as_many_steps_as_on_its_true_labels_alone(maps, capsys):
    """Batches of 4: six slices make one step an epoch, fourteen make three."""
    words = ["--predicted", "maps", "--cache", "cache", *TINY[:-2], "--batch-size", "4", "--n-subjects", "1"]
    assert finetune.main([*words, "--benchmark", "1"]) == 0
    said = capsys.readouterr().out
    assert "6 labelled, 8 predicted" in said and "whole training: 334 epochs x 3 steps" in said


def test_the_true_labels_of_teachers_count(maps):
    _, split, write = maps
    write(subjects=split["train"])
    assert scoring.origin(train())["arm"]["n_subjects"] == len(split["train"])


def test_a_split_file_names_the_subjects_with_true_labels(maps, tmp_path):
    _, split, _ = maps
    few = {"train": split["train"][1:2], "validation": [], "test": []}
    (tmp_path / "few.json").write_text(json.dumps(few))
    student = train("--labelled", "few.json")
    assert student.provenance.subjects == split["train"][1:2]
    assert not student.provenance.all_subjects


def test_what_a_student_has_seen_covers_its_teachers():
    origin = {"data": [], "split": {}, "split_seed": 0, "seed": 0}
    first = Provenance(method="motion", subjects=["a/1"], digests={"a/1": "x"}, **origin)
    teacher = Provenance(method="segmentation", subjects=["a/2"], init=first, **origin)
    student = Provenance(
        method="segmentation", subjects=["a/3"], predicted=["a/4"], teachers=[teacher], **origin
    )
    read = Provenance.from_dict(json.loads(json.dumps(student.to_dict())))
    assert read == student and list(read.seen()) == ["a/3", "a/4", "a/2", "a/1"]
    assert read.image_digests() == {"a/1": "x"}


@pytest.mark.parametrize("part", ["validation", "test"])
def test_maps_of_a_network_that_was_trained_on_a_held_out_subject_are_refused(maps, part):
    _, split, write = maps
    write(subjects=[split[part][0]])
    with pytest.raises(UserError, match=split[part][0]):
        train()
    file = Path("maps/predictions.json")  # so are those of several networks, if it is one of them
    content = json.loads(file.read_text())
    innocent = json.loads(json.dumps(content["networks"][0]))
    innocent["provenance"]["subjects"] = split["train"][:1]
    file.write_text(json.dumps({**content, "networks": [innocent, *content["networks"]]}))
    with pytest.raises(UserError, match=split[part][0]):
        train()


@pytest.mark.parametrize("kind", ["subjects", "predicted"])
def test_so_are_those_that_had_its_images_under_another_name(maps, kind):
    cines, split, write = maps
    image = cines.digests()[split["test"][0]]
    write(**{kind: ["other/name"]}, digests={"other/name": image})
    with pytest.raises(UserError, match="other/name"):
        train()


def test_maps_without_a_good_frame_of_an_unlabelled_training_subject_are_refused(maps):
    cines, split, write = maps
    held_out = [cines.subjects[cines.index[key]] for key in (*split["validation"], *split["test"])]
    write({s.file_name: {"digest": cines.cines[cines.index[s.key]].digest, "frames": [0]} for s in held_out})
    with pytest.raises(UserError, match="--predicted"):
        train()


def test_a_folder_without_predictions_is_refused(maps, tmp_path):
    file = tmp_path / "maps" / "predictions.json"
    empty = '{"cines": {}, "networks": [], "options": {}}'
    for content in ("[1]", '{"cines": {}}', '{"cines": {', empty, None):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(UserError, match=r"predictions\.json"):
            train()


def test_a_map_that_is_gone_is_refused(maps, tmp_path):
    cines, split, _ = maps
    for key in split["train"]:
        name = cines.subjects[cines.index[key]].file_name
        (tmp_path / "maps" / f"{name}{dataset.PREDICTED}").unlink()
    with pytest.raises(UserError, match=dataset.PREDICTED):
        train()


@pytest.mark.parametrize(("flag", "value"), [("--predicted-weight", "2"), ("--transfer", "encoder")])
def test_a_weight_needs_maps_and_a_transfer_a_checkpoint(flag, value, capsys):
    with pytest.raises(SystemExit):
        finetune.main([flag, value])
    assert flag in capsys.readouterr().err


def test_a_stopped_student_goes_on_to_the_same_bits(maps, tmp_path, monkeypatch):
    words = ["--predicted-share", "0.5", "--predicted-weight", "0.5"]
    origin = train(*words, out="whole").provenance
    assert origin.hyperparameters["predicted_share"] == 0.5
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "Batches", partial(Interrupting, at=(0, 2)))
        with pytest.raises(Stopped):
            train(*words, out="broken")
    assert finetune.main(["--resume", "broken"]) == 0
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_a_student_does_not_go_on_with_other_good_frames(maps, monkeypatch):
    cines, _, write = maps
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "Batches", partial(Interrupting, at=(0, 2)))
        with pytest.raises(Stopped):
            train(out="broken")
    pairs = zip(cines.subjects, cines.cines, cines.labels, strict=True)
    write({s.file_name: {"digest": cine.digest, "frames": [labels.es]} for s, cine, labels in pairs})
    with pytest.raises(UserError, match="labels"):
        finetune.main(["--resume", "broken"])


def test_a_copy_of_a_labelled_cine_gets_no_predicted_labels(write_mnms, beating, tmp_path, monkeypatch):
    """B is A without labels."""
    write_mnms("A", *beating(0))
    write_mnms("B", beating(0)[0])
    folder = write_mnms("C", beating(1)[0])
    subjects, _ = dataset.find([str(folder)], tmp_path)
    cines = store.build(subjects, tmp_path / "cache", labels=False)
    (tmp_path / "maps").mkdir()
    for subject in subjects:
        shutil.copy(folder / "A_sa_gt.nii.gz", tmp_path / "maps" / f"{subject.file_name}{dataset.PREDICTED}")
    pairs = zip(subjects, cines.cines, strict=True)
    found = {s.file_name: {"digest": cine.digest, "frames": [0, 2]} for s, cine in pairs}
    split = {"train": [s.key for s in subjects], "validation": [], "test": []}
    origin = {"data": [str(folder)], "split": split, "split_seed": 0, "seed": 0, "subjects": ["mnms/A"]}
    teacher = Checkpoint(Path("unet.pt"), {}, CONFIG, Provenance(method="segmentation", **origin))
    label_maps.write(tmp_path / "maps", found, [teacher], {})
    words = ["--predicted", "maps", "--cache", "cache", *TINY, "--batch-size", "4", "--out", "student"]
    monkeypatch.chdir(tmp_path)
    assert finetune.main(words) == 0
    assert checkpoints.load("student").provenance.predicted == ["mnms/C"]


def test_the_phases_of_maps_are_unknown(maps, capsys):
    with pytest.raises(SystemExit) as stop:
        train("--phases", "ed")
    assert stop.value.code == 2 and "--phases" in capsys.readouterr().err


def test_maps_that_are_gone_are_no_self_training(maps, tmp_path):
    """--skip-broken leaves out a subject whose label map cannot be read."""
    for path in (tmp_path / "maps").glob(f"*{dataset.PREDICTED}"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="--predicted"):
        train("--skip-broken")


def test_a_list_of_labelled_subjects_that_names_none_is_refused(maps, tmp_path):
    (tmp_path / "few.json").write_text(json.dumps({"train": ["x/1"], "validation": [], "test": []}))
    with pytest.raises(UserError, match=r"--labelled .*few\.json: 0 of the 1 "):
        train("--labelled", "few.json")
    (tmp_path / "few.json").write_text(json.dumps({"train": [], "validation": [], "test": []}))
    with pytest.raises(UserError, match=r"--labelled .*few\.json: 0 of the 0 "):
        train("--labelled", "few.json")
    with pytest.raises(UserError, match=r"--labelled .*absent"):
        train("--labelled", "absent")


def test_what_was_known_of_label_maps_is_forgotten_before_new_ones(maps, tmp_path):
    label_maps.forget(tmp_path / "maps")
    with pytest.raises(UserError, match=r"predictions\.json"):
        train()
