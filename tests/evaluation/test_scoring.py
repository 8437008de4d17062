"""Scores of a split: slices and thirds, means without classes that no reference has, failures, recipes."""

import math
from functools import partial

import nibabel
import numpy as np
import pytest
import torch
from loop import segmentation

from cmrssp.data import dataset, store
from cmrssp.evaluation import scoring, text
from cmrssp.evaluation.validation import mean_dice
from cmrssp.segmentation import Segmentation, predict_frames
from cmrssp.weights.provenance import Provenance


def network(seed: int, size: int = 32, spacing: float = 3.0) -> Segmentation:
    """Random weights; without biases the heads prefer no class, so all classes are predicted."""
    torch.manual_seed(seed)
    method = segmentation(channels=[4, 8, 8], image_size=size, spacing_mm=spacing).eval()
    with torch.no_grad():
        for head in method.unet.heads:
            head.weight.mul_(20)
            head.bias.zero_()
    return method


def predicting(cines: store.Store) -> scoring.Predict:
    return partial(predict_frames, [network(0)], cines, device=torch.device("cpu"))


@pytest.fixture
def three(write_mnms, beating, tmp_path) -> store.Store:
    """Subjects A, B and C; the RV of none is labelled."""
    for seed, name in enumerate("ABC"):
        cine, labels = beating(seed)
        folder = write_mnms(name, cine, np.where(labels == 3, 0, labels))
    subjects, _ = dataset.find([str(folder)], tmp_path)
    return store.build(subjects, tmp_path / "cache", labels=True)


def test_a_subject_that_fails_is_named_and_the_others_are_scored(three):
    path = three.cines[1].path
    path.write_bytes(path.read_bytes()[:2000])
    scores = scoring.score(predicting(three), three, phases="both")
    assert {row["subject"] for row in scores.rows} == {"mnms/A", "mnms/C"}
    assert [row["subject"] for row in scores.clinical] == ["mnms/A", "mnms/C"]
    (failure,) = scores.failed
    assert failure.startswith("mnms/B: ")


def test_a_class_that_no_reference_has_is_left_out_of_the_means_and_named(three):
    scores = scoring.score(predicting(three), three, phases="both")
    assert scores.present == ["LV", "MYO"]
    rows = scoring.breakdown(scores)
    table = {(r["by"], r["class"]): r["mean"] for r in rows if r["metric"] == "dice"}
    dice = [row["dice"] for row in scores.rows if row["class"] in ("LV", "MYO")]
    assert table["all", "mean"] == pytest.approx(np.mean(dice)) and ("all", "RV") not in table
    assert "RV" in text.notes(scores)
    line = text.dice_table(rows).splitlines()[3]
    assert line.split()[-4:-3] == ["-"] and line.endswith(f"{np.mean(dice):.3f} ± " + line.split()[-1])


def test_a_class_that_no_reference_has_is_neither_missed_nor_measured(three):
    scores = scoring.score(predicting(three), three, phases="both")
    for row in scores.clinical:
        assert row["rv_edv_ml"] is not None and row["rv_edv_ml_reference"] is row["rv_edv_ml_error"] is None
        assert row["lv_edv_ml_error"] == row["lv_edv_ml"] - row["lv_edv_ml_reference"]
    assert "RV" not in scores.missed and scores.undrawn == ["RV"]


def test_what_is_not_drawn_in_a_phase_or_a_patient(write_mnms, beating, tmp_path):
    """The myocardium at ED alone (frame 2), the RV not in A; the prediction draws everything and is right."""

    def stored(*, everything: bool) -> store.Store:
        for seed, name in enumerate("ABC"):
            cine, labels = beating(seed)
            if not everything:
                labels = np.where((labels == 3) & (name == "A"), 0, labels)
                labels[..., 0][labels[..., 0] == 2] = 0
            folder = write_mnms(name, cine, labels)
        subjects, _ = dataset.find([str(folder)], tmp_path)
        return store.build(subjects, tmp_path / str(everything), labels=True)

    whole, cines = stored(everything=True), stored(everything=False)

    def right(subject: int, frames: list[int]):
        return (whole.label_volume(subject, frame) for frame in frames)

    scores = scoring.score(right, cines, phases="both")
    assert scores.undrawn == ["MYO at ES"] and scores.missed == {"RV": 2}
    found = {(row["subject"], row["phase"], row["class"]): row["dice"] for row in scores.rows}
    assert len(found) == 3 * 5 and {key for key, dice in found.items() if dice != 1} == {
        ("mnms/A", "ED", "RV"), ("mnms/A", "ES", "RV"),
    }  # fmt: skip
    table = scoring.breakdown(scores)
    es = {r["class"]: r["mean"] for r in table if (r["group"], r["metric"]) == ("ES", "dice")}
    assert es["mean"] == pytest.approx((0.5 + 1 + 1) / 3) and math.isnan(es["MYO"])
    assert text.dice_table(table).splitlines()[2].split()[4] == "-"  # after ES and the LV's mean ± std
    assert "MYO at ES" in text.notes(scores) and "RV in 2 volumes (2 undrawn)" in text.notes(scores)
    first, second = scores.clinical[:2]
    assert first["rv_edv_ml"] > 0 and first["rv_edv_ml_reference"] is first["rv_ef_percent_error"] is None
    assert second["rv_edv_ml_error"] == second["lv_mass_g_error"] == first["lv_esv_ml_error"] == 0

    method = network(0)
    figures = mean_dice(method, cines, [s.key for s in cines.subjects], torch.device("cpu"))
    measured = scoring.score(predicting(cines), cines, phases="both").rows
    for name in ("LV", "MYO", "RV"):
        dice = [row["dice"] for row in measured if row["class"] == name]
        assert figures[f"dice_{name}"] == pytest.approx(np.mean(dice)) and len(dice) == 6 - 3 * (
            name == "MYO"
        )


def test_a_cine_that_cannot_be_measured_has_dice_but_no_volumes(write_mnms, beating, tmp_path):
    cine, labels = (np.repeat(array, 2, axis=2) for array in beating())
    subjects, _ = dataset.find([str(write_mnms("A", cine, labels))], tmp_path)
    cines = store.build(subjects, tmp_path / "cache", labels=True)
    scores = scoring.score(predicting(cines), cines, phases="both")
    assert not cines.cines[0].measurable and all(0 <= row["dice"] <= 1 for row in scores.rows)
    assert all(math.isnan(row[n]) for row in scores.rows for n in ("volume_ml", "reference_ml", "hd95_mm"))
    assert scores.clinical[0]["lv_edv_ml"] is None and scores.clinical[0]["lv_ef_percent_reference"] is None
    assert scores.present == ["LV", "MYO", "RV"]


def test_a_picture_that_fails_takes_no_score_with_it(three, tmp_path):
    scores = scoring.score(predicting(three), three, phases="both")

    def no_prediction(subject: int, frames: list[int]):
        raise OSError("no space left")

    table = scoring.breakdown(scores)
    names = scoring.write(tmp_path / "out", scores, table, {"split": "test"}, no_prediction, three)
    assert "contours.png" not in names and {"metrics.csv", "summary.json", "boxes.png"} <= set(names)
    assert scores.failed == ["contours.png: OSError: no space left"]


def test_thirds_and_slices_by_hand():
    """Six slices, the reference labels 1 to 4: slice 0 and 5 lie outside every third."""
    reference = np.zeros((6, 4, 4), np.uint8)
    reference[1:5, :2] = 1
    labels = reference.copy()
    labels[1, 1] = 0  # half of it: Dice 2 * 4 / (4 + 8)
    labels[5, 0, 0] = 2
    rows = {(r["slice"], r["class"]): r for r in scoring.slice_rows(labels, reference)}
    assert [rows[z, "LV"]["third"] for z in range(6)] == ["", "base", "base", "mid", "apex", ""]
    assert rows[1, "LV"]["dice"] == pytest.approx(8 / 12) and rows[2, "LV"]["dice"] == 1.0
    assert np.isnan(rows[1, "RV"]["dice"]) and rows[5, "MYO"]["dice"] == 0.0
    assert rows[3, "LV"]["position"] == 0.5
    two = [r["third"] for r in scoring.slice_rows(labels[:3], reference[:3]) if r["class"] == "LV"]
    three = [r["third"] for r in scoring.slice_rows(labels[:4], reference[:4]) if r["class"] == "LV"]
    assert two == ["", "", ""] and three == ["", "base", "mid", "apex"]  # two labelled slices, and three
    (single,) = (r for r in scoring.slice_rows(labels[1:2], reference[1:2]) if r["class"] == "LV")
    assert np.isnan(single["position"]) and single["third"] == ""


def test_label_maps_of_two_data_sets_keep_apart(write_mnms, beating, tmp_path):
    """One subject name in both, cines of 32 x 40 and 33 x 40 pixels."""
    write_mnms("A", *beating(0))
    cine, labels = beating(1)
    pads = ((1, 0), (0, 0), (0, 0), (0, 0))
    plain = tmp_path / "plain"
    plain.mkdir()
    for name, array in (("A", np.pad(cine, pads)), ("A_gt", np.pad(labels, pads))):
        nibabel.save(nibabel.Nifti1Image(array, np.diag((1.5, 1.5, 10, 1))), plain / f"{name}.nii.gz")
    subjects, _ = dataset.find([str(tmp_path / "mnms"), str(plain)], tmp_path)
    cines = store.build(subjects, tmp_path / "cache", labels=True)
    scoring.score(predicting(cines), cines, phases="both", save=tmp_path / "maps")
    shapes = {p.name: nibabel.load(p).shape[:2] for p in (tmp_path / "maps").iterdir()}
    assert set(shapes) == {"folder__A_labels.nii.gz", "mnms__A_labels.nii.gz"}
    for subject, record in zip(cines.subjects, cines.cines, strict=True):
        name = f"{subject.key.replace('/', '__')}_labels.nii.gz"
        assert sorted(shapes[name]) == sorted(record.shape[2:])


def test_seeds_of_one_experiment_share_their_training_subjects():
    def made(train, validation, **more):
        split = {"train": train, "validation": validation, "test": ["x/t"]}
        link = {"method": "m", "data": [], "split_seed": 0, "seed": 0, "subjects": train[:1], **more}
        return {**link, "split": split}

    def recipe(link):
        return scoring.training_recipe(Provenance.from_dict(link))

    one = recipe(made(["x/a", "x/b"], ["x/c"], hyperparameters={"lr": 1}))
    assert one == recipe(made(["x/b", "x/a"], ["x/c"], hyperparameters={"lr": 1}, seed=1, subjects=["x/b"]))
    assert one["lr"] == 1 and len(one) == 2
    assert one != recipe(made(["x/a", "x/d"], ["x/c"], hyperparameters={"lr": 1}))
    # the lists of a published subset are of its seed
    assert recipe(made(["x/a"], ["x/c", "x/d"])) == recipe(made(["x/b"], ["x/c", "x/d"]))
    # the pretraining's, too
    first = made(["x/a", "x/b"], [], hyperparameters={"epochs": 5})
    started = made(["x/a", "x/b"], ["x/c"], init=first)
    assert recipe(started)["pretraining epochs"] == 5
    assert recipe(started) != recipe({**started, "init": made(["x/a"], [], hyperparameters={"epochs": 5})})


def test_so_do_the_teachers_of_students_and_how_they_predicted():
    def recipe(lr=1, seed=0, flips=True):
        split = {"train": ["x/a"], "validation": []}
        link = {"method": "m", "data": [], "split_seed": 0, "subjects": [], "split": split}
        teacher = {**link, "seed": seed, "hyperparameters": {"lr": lr}}
        student = {**link, "seed": seed, "teachers": [teacher], "predicting": {"flips": flips}}
        return scoring.training_recipe(Provenance.from_dict(student))

    assert recipe() == recipe(seed=1)
    assert recipe() != recipe(lr=2) and recipe() != recipe(flips=False)
