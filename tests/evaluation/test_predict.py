"""evaluate.py --predict, on cines of the phantom: results, odd inputs, errors, damaged files."""

import csv
import gzip
import json
import os
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from fuzz_predict import campaign
from processes import Script

import evaluate
from cmrssp.errors import UserError
from cmrssp.unet import UNet


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Random weights; without biases the heads prefer no class, so all classes are predicted."""
    torch.manual_seed(1)
    network = UNet(channels=[4, 8], num_outputs=4, num_heads=1, norm="batch")
    with torch.no_grad():
        for head in network.heads:
            head.weight.mul_(20)
            head.bias.zero_()
    link = {"method": "segmentation", "data": ["phantom"], "split_seed": 0, "seed": 0, "subjects": []}
    link["split"] = {"train": [], "validation": [], "test": []}
    config = {"channels": [4, 8], "norm": "batch", "image_size": 32, "spacing_mm": 6.0}
    path = tmp_path_factory.mktemp("run") / "unet.pt"
    content = {
        "state_dict": network.state_dict(),
        "config": {**config, "classes": ["LV", "MYO", "RV"]},
        "provenance": link,
    }
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def cine(phantom_folder) -> nibabel.Nifti1Image:
    return nibabel.load(sorted(phantom_folder.rglob("*_sa.nii.gz"))[0])


@pytest.fixture
def predict(checkpoint, tmp_path):
    """predict(folder, *flags) -> (exit status, {cine: row of clinical.csv}, {names of the files})."""

    def run(folder: Path, *flags: str) -> tuple[int, dict[str, dict], set[str]]:
        out = tmp_path / "out"
        words = ["--predict", folder, "--checkpoint", checkpoint, "--out", out, "--cache", tmp_path / "cache"]
        try:
            status = evaluate.main([*map(str, words), *flags])
        except UserError:
            status = 2
        rows = {row["cine"]: row for row in csv.DictReader((out / "clinical.csv").open())}
        return status, rows, {path.name for path in out.iterdir()}

    return run


@pytest.fixture
def scans(tmp_path, cine):
    """scans(name=array, ...) -> a folder with these cines on the grid of the phantom's."""

    def save(**arrays: np.ndarray) -> Path:
        for name, array in arrays.items():
            (tmp_path / "scans").mkdir(exist_ok=True)
            image = nibabel.Nifti1Image(array, cine.affine, cine.header)
            nibabel.save(image, tmp_path / "scans" / f"{name}.nii.gz")
        return tmp_path / "scans"

    return save


def test_a_phantom_is_segmented_in_every_frame(predict, scans, cine, tmp_path):
    array = np.asanyarray(cine.dataobj)
    status, rows, names = predict(scans(beat=array, still=array[..., :1]))
    assert status == 0 and names == {
        "clinical.csv", "predictions.json", "beat_labels.nii.gz", "beat_contours.png", "beat_volumes.png",
        "beat.gif", "still_labels.nii.gz", "still_contours.png",
    }  # fmt: skip
    known = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert known["cines"].keys() == {"beat", "still"} and len(known["cines"]["beat"]["digest"]) == 64
    assert known["networks"][0]["config"]["channels"] == [4, 8] and known["options"]["flips"] is False
    labels = nibabel.load(tmp_path / "out" / "beat_labels.nii.gz")
    assert labels.shape == cine.shape and (labels.affine == cine.affine).all()
    voxel_ml = abs(np.linalg.det(cine.affine[:3, :3])) / 1000
    lv = (np.asanyarray(labels.dataobj) == 1).sum(axis=(0, 1, 2)) * voxel_ml
    row = rows["beat"]
    assert float(row["lv_edv_ml"]) == pytest.approx(lv.max(), rel=1e-4)
    assert float(row["lv_esv_ml"]) == pytest.approx(lv.min(), rel=1e-4)
    assert (int(row["ed_frame"]), int(row["es_frame"])) == (lv.argmax(), lv.argmin())
    assert rows["still"]["lv_esv_ml"] == rows["still"]["lv_ef_percent"] == ""
    assert rows["still"]["lv_edv_ml"] != ""


def test_nothing_is_left_in_the_cache(predict, scans, cine, tmp_path):
    predict(scans(beat=np.asanyarray(cine.dataobj)))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_cine_that_cannot_be_measured_has_no_volumes_and_a_flag(predict, scans, cine):
    twice = np.repeat(np.asanyarray(cine.dataobj), 2, axis=2)
    status, rows, names = predict(scans(twice=twice))
    row = rows["twice"]
    assert status == 0 and {row[name] for name in row if name.endswith(("_ml", "_g", "_percent"))} == {""}
    assert "repeat" in row["flags"] and "twice_labels.nii.gz" in names


def test_an_empty_frame_is_not_es(predict, scans, cine):
    array = np.concatenate([np.asanyarray(cine.dataobj)] * 2, axis=3)
    array[..., 4] = 0
    _, rows, _ = predict(scans(gap=array))
    assert rows["gap"]["es_frame"] != "4" and "constant frames: 4" in rows["gap"]["flags"]


def test_a_broken_cine_is_a_row_and_the_others_are_predicted(predict, scans, cine, tmp_path):
    folder = scans(sound=np.asanyarray(cine.dataobj))
    (folder / "broken.nii.gz").write_bytes(gzip.compress(b"no image"))
    status, rows, names = predict(folder)
    assert status == 2 and list(rows) == ["broken", "sound"]
    assert "cannot be read" in rows["broken"]["error"] and rows["broken"]["lv_edv_ml"] == ""
    assert rows["sound"]["error"] == "" and "sound.gif" in names and "broken.gif" not in names
    assert "predictions.json" in names
    (folder / "sound.nii.gz").unlink()  # the next prediction here makes no label map that it could describe
    status, _, names = predict(folder)
    known = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert status == 2 and known == {"cines": {}, "networks": [], "options": {}}


def test_a_name_too_long_for_its_results_is_a_row(predict, scans, cine):
    long = "n" * 240
    array = np.asanyarray(cine.dataobj)
    status, rows, names = predict(scans(sound=array, **{long: array}))
    assert status == 2 and "File name too long" in rows[long]["error"]
    assert rows[long]["lv_edv_ml"] == rows["sound"]["lv_edv_ml"] != "" and "sound_labels.nii.gz" in names


def test_a_picture_that_fails_takes_nothing_else_with_it(predict, scans, cine, tmp_path):
    folder = scans(beat=np.asanyarray(cine.dataobj))
    (tmp_path / "out" / "beat.gif").mkdir(parents=True)  # in its way
    status, rows, names = predict(folder)
    assert status == 2 and "beat.gif" in rows["beat"]["error"] and rows["beat"]["lv_edv_ml"] != ""
    assert {"beat_labels.nii.gz", "beat_contours.png", "beat_volumes.png"} <= names


def test_what_a_killed_prediction_left_is_removed(predict, scans, cine, tmp_path):
    old = tmp_path / "out" / ".beat.gif.0123.tmp"
    old.parent.mkdir()
    old.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert old.name not in predict(scans(beat=np.asanyarray(cine.dataobj)[..., :1]))[2]


def test_a_prediction_needs_no_split(predict, scans, cine):
    folder = scans(beat=np.asanyarray(cine.dataobj))
    (folder / "subjects.csv").write_text("subject,split\nbeat,perhaps\n")
    assert predict(folder)[0] == 0


def test_an_ascii_output_loses_no_result(checkpoint, scans, cine, tmp_path):
    folder = scans(**{"müller": np.asanyarray(cine.dataobj)[..., :1]})

    def ascii() -> None:
        sys.stdout.reconfigure(encoding="ascii")

    words = ("--predict", folder, "--checkpoint", checkpoint, "--out", "out")
    status, _, errors = Script(evaluate.main, *words, name="evaluate.py", cwd=tmp_path, prepare=ascii).end()
    assert status == 0, errors
    rows = list(csv.DictReader((tmp_path / "out" / "clinical.csv").open(encoding="utf-8")))
    assert [row["cine"] for row in rows] == ["müller"]


@pytest.mark.parametrize("count", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_damaged_cines(checkpoint, count):
    found = campaign(0, count, str(checkpoint))
    assert sum(found["results"].values()) == count
    assert {"right", "flagged", "a row that says why"} <= set(found["results"])
    assert found["grown_mb"] < 150  # whatever a header claims
