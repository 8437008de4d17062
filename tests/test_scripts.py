"""The three scripts as a person runs them, in processes of their own, on the small phantom."""

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from processes import Script

import evaluate
import finetune
import train_ssp
from cmrssp.cli import entry, flags
from cmrssp.data import dataset, store
from cmrssp.data.batches import Slices, collate
from cmrssp.errors import UserError
from cmrssp.evaluation import scoring
from cmrssp.hardware import memory
from cmrssp.metrics import dice
from cmrssp.ssp import METHODS
from cmrssp.training import step_generator

ROOT = Path(__file__).parents[1]
TINY = ["--channels", "4", "8", "8", "--image-size", "32", "--spacing", "6"]


def script(module, *words, cwd, expect=0):
    """(stdout, stderr) of a script in a process of its own."""
    status, *said = Script(module.main, *words, name=f"{module.__name__}.py", cwd=cwd).end()
    assert status == expect, said
    return said


@pytest.fixture(scope="module")
def way(tmp_path_factory, phantom_folder):
    """Pretrained, fine-tuned and evaluated once; every test looks at the results."""
    cwd = tmp_path_factory.mktemp("way")
    common = ("--cache", cwd / "cache")
    words = ("--method", "mim", "--data", phantom_folder, *common, *TINY, "--patch-size", 8)
    command = [sys.executable, ROOT / "train_ssp.py", *words, "--epochs", 2, "--batch-size", 8]
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cached = sorted(p.suffix for p in (cwd / "cache" / "store").iterdir())
    words = ("--init", "runs/mim-hearts", "--n-subjects", 3, *common, "--epochs", 2, "--batch-size", 4)
    tuned, _ = script(finetune, *words, cwd=cwd)
    scored, _ = script(evaluate, "--split", "test", *common, cwd=cwd)
    return cwd, {"pretrain": done.stdout, "cached": cached, "finetune": tuned, "evaluate": scored}


def test_pretraining_leaves_a_run_folder(way, phantom_folder):
    cwd, out = way
    run = cwd / "runs" / "mim-hearts"
    assert out["pretrain"].splitlines()[0] == f"data: {phantom_folder}"
    assert {p.name for p in run.iterdir()} == {
        "args.json",
        "split.json",
        "log.jsonl",
        "last.pt",
        "unet.pt",
        "views.png",
        "curves.png",
        ".lock",
    }
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2] and all("validation_loss" in r for r in records)
    assert json.loads((run / "args.json").read_text())["lr"] == 0.01  # the paper's
    assert set(out["cached"]) == {".cine"} and len(out["cached"]) == 8  # no label was stored


def test_fine_tuning_takes_what_the_checkpoint_says(way):
    cwd, out = way
    run = cwd / "runs" / "finetune-mim-hearts-n3-seed0"
    args, split = (json.loads((run / name).read_text()) for name in ("args.json", "split.json"))
    assert (args["channels"], args["image_size"], args["spacing_mm"], args["lr"]) == (
        [4, 8, 8],
        32,
        6.0,
        0.005,
    )
    assert split == json.loads((cwd / "runs" / "mim-hearts" / "split.json").read_text())
    assert len(args["subjects"]) == 3 and set(args["subjects"]) <= set(split["train"])
    assert "encoder: transferred, 42 tensors" in out["finetune"] and "heads: fresh" in out["finetune"]
    seen = torch.load(run / "unet.pt", weights_only=True)["provenance"]
    assert seen["subjects"] == args["subjects"] and seen["init"]["subjects"] == split["train"]
    assert not set(split["validation"] + split["test"]) & {*seen["subjects"], *seen["init"]["subjects"]}


def test_evaluation_scores_every_labelled_volume_of_the_split(way):
    cwd, out = way
    run = cwd / "runs" / "finetune-mim-hearts-n3-seed0"
    assert out["evaluate"].splitlines()[0] == f"checkpoint: {run.relative_to(cwd) / 'unet.pt'}"
    test = json.loads((run / "split.json").read_text())["test"]
    rows = list(csv.DictReader((run / "evaluation-test" / "metrics.csv").open()))
    assert {(r["subject"], r["phase"], r["class"]) for r in rows} == {
        (s, p, c) for s in test for p in ("ED", "ES") for c in ("LV", "MYO", "RV")
    }
    summary = json.loads((run / "evaluation-test" / "summary.json").read_text())
    scores = [float(r["dice"]) for r in rows if r["phase"] == "ED" and r["class"] == "LV"]
    assert summary["dice"]["ED"]["LV"]["mean"] == pytest.approx(np.mean(scores), abs=1e-5)
    assert summary["dice"]["ED"]["LV"]["std"] == pytest.approx(np.std(scores, ddof=1), abs=1e-5)
    assert f"{summary['dice']['both']['mean']['mean']:.3f} ±" in out["evaluate"]
    assert (run / "evaluation-test" / "contours.png").stat().st_size > 10000
    *_, last = sorted((run / "evaluation-test").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert last.name == "summary.json"


def test_an_unfinished_training_is_scored_apart_and_in_no_table(way, tmp_path, capsys, refused):
    cwd, _ = way
    run = cwd / "runs" / "finetune-mim-hearts-n3-seed0"
    content = torch.load(run / "last.pt", weights_only=True)
    content["provenance"]["epochs"] -= 1
    (tmp_path / "part").mkdir()
    torch.save(content, tmp_path / "part" / "last.pt")
    assert evaluate.main(["--checkpoint", str(tmp_path / "part"), "--cache", str(cwd / "cache")]) == 0
    epochs = content["provenance"]["epochs"]
    assert f"{epochs} of {epochs + 1} epochs" in "".join(capsys.readouterr())
    assert (tmp_path / "part" / f"evaluation-test-epoch{epochs}" / "summary.json").is_file()


def test_the_logged_dice_is_that_of_the_evaluation(way):
    cwd, _ = way
    run = cwd / "runs" / "finetune-mim-hearts-n3-seed0"
    words = ("--split", "validation", "--checkpoint", run, "--cache", cwd / "cache")
    assert evaluate.main([*map(str, words), "--out", str(cwd / "scored")]) == 0
    dice = json.loads((cwd / "scored" / "summary.json").read_text(), parse_constant=pytest.fail)["dice"][
        "both"
    ]
    logged = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    for name in ("LV", "MYO", "RV"):
        assert dice[name]["mean"] == pytest.approx(logged[f"dice_{name}"], abs=1e-9)


def test_every_subject_of_another_hospital_is_scored(way, phantom_folder, tmp_path, capsys):
    """Where --split test would draw one of two; unless one has been trained on under another name."""
    cwd, _ = way
    run = cwd / "runs" / "finetune-mim-hearts-n3-seed0"
    split = json.loads((run / "split.json").read_text())
    words = ["--split", "all", "--checkpoint", str(run), "--cache", str(cwd / "cache")]
    words += ["--data", str(tmp_path / "other"), "--out", str(tmp_path / "scored")]
    (tmp_path / "other").mkdir()

    def copy(key: str) -> None:
        for path in phantom_folder.rglob(f"{key.split('/')[1]}_sa*.nii.gz"):
            shutil.copy(path, tmp_path / "other" / path.name.replace("_sa", ""))

    for key in split["test"]:
        copy(key)
    assert evaluate.main(words) == 0
    rows = list(csv.DictReader((tmp_path / "scored" / "metrics.csv").open()))
    assert len(split["test"]) == 2
    assert {row["subject"] for row in rows} == {key.replace("mnms", "folder") for key in split["test"]}
    copy(split["train"][0])
    with pytest.raises(UserError, match=split["train"][0]):
        evaluate.main(words)
    (tmp_path / "other" / f"{split['train'][0].split('/')[1]}_gt.nii.gz").unlink()  # then it is not scored
    assert evaluate.main(words) == 0


def test_predictions_score_the_same_on_the_files_own_grid(way, phantom_folder):
    """The Dice of metrics.csv again, from the files and the network alone, in the file's own axes."""
    from cmrssp import segmentation
    from cmrssp.data import dataset
    from cmrssp.weights import checkpoints

    cwd, _ = way
    run = cwd / "runs" / "finetune-mim-hearts-n3-seed0"
    method = segmentation.restore(checkpoints.load(run))
    row = next(csv.DictReader((run / "evaluation-test" / "metrics.csv").open()))
    subject = next(s for s in dataset.find([str(phantom_folder)], cwd)[0] if s.key == row["subject"])
    cines = store.build([subject], cwd / "cache", labels=False)
    (labels,) = segmentation.predict_frames([method], cines, 0, [int(row["frame"])], torch.device("cpu"))
    ours = cines.cines[0].geometry.from_canonical(labels[None])[..., 0]
    truth = np.asanyarray(nibabel.load(subject.labels[0].path).dataobj)[..., int(row["frame"])]
    assert dice(ours, truth)[row["class"]] == pytest.approx(float(row["dice"]), abs=1e-6)


def test_identical_runs_give_identical_weights(way, phantom_folder):
    """The run that every other test looks at, once more, in another process."""
    cwd, _ = way
    words = ("--method", "mim", "--data", phantom_folder, "--cache", cwd / "cache", *TINY, "--patch-size", 8)
    words = (*words, "--epochs", 2, "--batch-size", 8, "--out", cwd / "again")
    assert train_ssp.main([*map(str, words)]) == 0
    assert (cwd / "again" / "unet.pt").read_bytes() == (cwd / "runs" / "mim-hearts" / "unet.pt").read_bytes()


OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def test_fine_tuning_opens_no_label_of_the_test(way, phantom_folder, tmp_path):
    cwd, _ = way
    words = ("--init", cwd / "runs" / "mim-hearts", "--cache", tmp_path / "cache", "--epochs", 1)
    OPENED.clear()
    assert finetune.main([*map(str, words), "--out", str(tmp_path / "run")]) == 0
    split = json.loads((cwd / "runs" / "mim-hearts" / "split.json").read_text())
    read = {Path(p).name.split("_sa_gt")[0] for p in OPENED if "_gt" in p}
    assert read == {key.split("/")[1] for key in split["train"] + split["validation"]}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(script, *words) -> the one line on stderr; run in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            entry.end(importlib.import_module(name.removesuffix(".py")).main)
        lines = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"{name}: error: "), lines
        return lines[0]

    return run


def test_wrong_words_end_in_one_line(way, phantom_folder, tmp_path, refused):
    cwd, _ = way
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    data = ("--data", phantom_folder, "--cache", cwd / "cache")
    run = cwd / "runs" / "finetune-mim-hearts-n3-seed0"
    mim = ("train_ssp.py", "--method", "mim")
    for words, parts in (
        ((*mim, "--data", "nowhere"), ("--data nowhere: no such folder",)),
        ((*mim, "--data", "empty"), ("--data empty: no cine found", "expected .nii or .nii.gz files")),
        (
            (*mim, *data, *TINY, "--patch-size", 5),
            ("--patch-size: expected a divisor of --image-size 32, got 5",),
        ),
        ((*mim, *data, "--image-size", 100), ("--image-size: expected a multiple of 64",)),
        ((*mim, "--epochs", 0), ("--epochs", "expected a number above 0, got 0")),
        ((*mim, "--treshold", "0.1"), ("unrecognized arguments: --treshold",)),
        ((*mim, "--device", "cuda:77"), ("--device",)),
        (("train_ssp.py", "--method", "nonsense"), ("--method", "invalid choice: 'nonsense'", "mim")),
        (("train_ssp.py",), ("--method",)),
        (("finetune.py", *data, "--n-subjects", 0), ("--n-subjects: expected 1 to 5", "got 0")),
        (("finetune.py", *data, "--n-subjects", 6), ("--n-subjects: expected 1 to 5", "got 6")),
        (("finetune.py", "--init", "none.pt"), ("none.pt: no such checkpoint",)),
        (("finetune.py", "--init", "text.pt"), ("text.pt: expected a checkpoint",)),
        (
            ("finetune.py", "--init", run, *data[2:], "--channels", 4, 8),
            ("does not fit this network", "--channels 4 8 8"),
        ),
        (("finetune.py", "--init", run, *data[2:], "--split-seed", 1), ("has been trained on", "subjects")),
        (("finetune.py", *data, "--seed", -1), ("--seed", "expected a number of at least 0, got -1")),
        (("finetune.py", *data, "--weight-decay", -1), ("--weight-decay", "of at least 0")),
        ((*mim, *data, "--device", "meta"), ("--device: expected auto, cpu, cuda",)),
        ((*mim, *data, "--device", "cpu:0"), ("--device: expected auto, cpu, cuda",)),
        (("finetune.py", *data, "--init", ""), ("--init: expected a path, got nothing",)),
        (("finetune.py", *data, "--out", ""), ("--out: expected a path, got nothing",)),
        ((*mim, *data, "--out", "text.pt"), ("--out text.pt: text.pt is no folder that can be written to",)),
        (
            ("train_ssp.py", "--method", "dino", *data, "--local-crops", 0),
            ("--local-crops", "expected a number above 0, got 0"),
        ),
        (
            (
                "train_ssp.py",
                "--method",
                "dino",
                *data,
                *TINY,
                "--local-size",
                4,
                "--local-crops",
                1,
                "--batch-size",
                1,
            ),
            ("--batch-size 1: batch norm needs",),
        ),
        (
            ("finetune.py", *data, "--image-size", 64, "--batch-size", 1),
            ("--batch-size 1: batch norm needs",),
        ),
        (
            ("train_ssp.py", "--method", "pcl", *data, *TINY, "--image-size", 64, "--batch-size", 1),
            ("--batch-size: pcl compares the slices of a batch", "at least 2 of them, got 1"),
        ),
        ((*mim, *data, "--lr", "inf"), ("--lr", "expected a number above 0, got inf")),
        ((*mim, *data, "--mask-ratio", "nan"), ("--mask-ratio", "expected a number from 0 to 1, got nan")),
        ((*mim, *data, "--split-file", "absent"), ("--split-file absent: No such file",)),
        ((*mim, "--data", "text.pt"), ("--data text.pt: no such folder",)),
        (("evaluate.py", "--split", "tset"), ("--split", "invalid choice: 'tset'")),
        (("evaluate.py",), ("no finished fine-tuned run", "finetune.py")),
        (("evaluate.py", "--predict", "", "--out", "x"), ("--predict", "expected a path, got nothing")),
        ((*mim, "--data", ""), ("--data", "expected a path, got nothing")),
        (
            ("evaluate.py", "--checkpoint", cwd / "runs" / "mim-hearts"),
            ("expected a fine-tuned segmentation network", "mim"),
        ),
    ):
        line = refused(*words)
        assert all(part in line for part in parts), line
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "text.pt"}  # nothing half-written


def test_evaluation_leaves_every_number_that_it_prints(way, phantom_folder, tmp_path, capsys):
    """Filters, saved label maps, and clinical numbers from the files alone."""
    cwd, _ = way
    run = cwd / "runs" / "finetune-mim-hearts-n3-seed0"
    plain = run / "evaluation-test"
    assert {p.name for p in plain.iterdir()} == {
        "metrics.csv", "slices.csv", "clinical.csv", "breakdown.csv", "summary.json", "contours.png",
        "agreement.png", "position.png", "boxes.png",
    }  # fmt: skip
    words = [
        "--split",
        "test",
        "--checkpoint",
        run,
        "--cache",
        cwd / "cache",
        "--phases",
        "ed",
        "--save-predictions",
    ]
    assert evaluate.main([*map(str, words), "--out", str(tmp_path / "ed")]) == 0
    assert "both " not in capsys.readouterr().out.split("3D Dice")[1].split("predicted")[0]
    both = list(csv.DictReader((plain / "metrics.csv").open()))
    ed = list(csv.DictReader((tmp_path / "ed" / "metrics.csv").open()))
    assert ed == [row for row in both if row["phase"] == "ED"]
    row = ed[0]
    key = row["subject"].split("/")[1]
    with pytest.raises(FileNotFoundError, match="label maps that a network predicted"):
        dataset.find([str(tmp_path / "ed")], tmp_path / "cache")  # they are no cines to train on
    maps = nibabel.load(tmp_path / "ed" / "predictions" / f"{key}_labels.nii.gz")
    truth = nibabel.load(next(phantom_folder.rglob(f"{key}_sa_gt.nii.gz")))
    ours, theirs = (np.asanyarray(i.dataobj)[..., int(row["frame"])] for i in (maps, truth))
    voxel_ml = abs(np.linalg.det(truth.affine[:3, :3])) / 1000
    assert maps.shape == truth.shape and (maps.affine == truth.affine).all()
    assert dice(ours, theirs)["LV"] == pytest.approx(float(row["dice"]), abs=1e-6)
    assert float(row["volume_ml"]) == pytest.approx((ours == 1).sum() * voxel_ml, rel=1e-4)
    clinical = {r["subject"]: r for r in csv.DictReader((plain / "clinical.csv").open())}[row["subject"]]
    edv, esv = (
        float(r["reference_ml"]) for r in both if r["subject"] == row["subject"] and r["class"] == "LV"
    )
    assert float(clinical["lv_ef_percent_reference"]) == pytest.approx(100 * (edv - esv) / edv, abs=1e-3)
    groups = list(csv.DictReader((plain / "breakdown.csv").open()))
    (group,) = (
        g for g in groups if (g["by"], g["group"], g["class"], g["metric"]) == ("phase", "ES", "RV", "dice")
    )
    values = [float(r["dice"]) for r in both if (r["phase"], r["class"]) == ("ES", "RV")]
    assert float(group["mean"]) == pytest.approx(np.mean(values), abs=1e-5) and int(group["number"]) == len(
        values
    )
    assert {g["by"] for g in groups} == {"all", "phase", "vendor", "pathology", "dataset", "third"}


def test_runs_are_compared_and_tabled(way, tmp_path, capsys, monkeypatch, refused):
    cwd, _ = way
    run = cwd / "runs" / "finetune-mim-hearts-n3-seed0"
    other = tmp_path / "other"
    shutil.copytree(run / "evaluation-test", other / "evaluation-test")
    rows = list(csv.DictReader((run / "evaluation-test" / "metrics.csv").open()))
    better = [{**row, "dice": f"{min(1, float(row['dice']) + 0.25):.6f}"} for row in rows]
    scoring.write_csv(other / "evaluation-test" / "metrics.csv", better)
    assert evaluate.main(["--compare", str(run), str(other)]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith(str(other))]
    assert len(lines) == 4 and all("+0.2500" in line for line in lines)  # mean, LV, MYO, RV
    assert str(run) in refused("evaluate.py", "--compare", run)
    line = refused("evaluate.py", "--compare", run, other, "--split", "train")
    assert str(run) in line and "python evaluate.py --split train" in line
    gone = {row["subject"] for row in rows[:3]}
    scoring.write_csv(
        other / "evaluation-test" / "metrics.csv", [r for r in rows if r["subject"] not in gone]
    )
    summary = json.loads((run / "evaluation-test" / "summary.json").read_text())
    fewer = {**summary, "subjects": sorted(set(summary["subjects"]) - gone)}
    (other / "evaluation-test" / "summary.json").write_text(json.dumps(fewer))
    assert "1 subjects differ" in refused("evaluate.py", "--compare", run, other)
    for wrong in (
        [row for row in rows if row["phase"] == "ED"],
        [{name: row[name] for name in row if name != "dice"} for row in rows],
    ):
        (other / "evaluation-test" / "summary.json").write_text(json.dumps(summary))
        scoring.write_csv(other / "evaluation-test" / "metrics.csv", wrong)
        line = refused("evaluate.py", "--compare", run, other)
        assert "different subjects or phases" in line or str(other) in line
    assert "error: --out " in refused("evaluate.py", "--compare", run, "--out", "x")
    assert "error: --flips " in refused("evaluate.py", "--compare", run, other, "--flips")
    # two runs of one name, and a third that differs in more than the seed, stay apart
    for folder, change in (("a", {}), ("b", {"settings": {"epochs": 7}}), ("c", {"recipe": {"lr": 7.0}})):
        copy = shutil.copytree(run / "evaluation-test", tmp_path / folder / "run" / "evaluation-test")
        summary = json.loads((copy / "summary.json").read_text())
        changes = {"arm": {"seed": 5}, **change}
        summary |= {name: {**summary[name], **values} for name, values in changes.items()}
        (copy / "summary.json").write_text(json.dumps(summary))
    folders = [str(tmp_path / name / "run") for name in "abc"]
    assert evaluate.main(["--compare", *folders, str(run)]) == 0
    apart, *said = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert "differ in epochs, lr: " in apart and len(said) == 4
    assert "a/run and 1 more seeds" in said[1]
    assert [line.split()[0] for line in said[2:]] == folders[1:]
    # an average of two networks is no seed of one of them
    path = tmp_path / "a" / "run" / "evaluation-test" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "checkpoints": ["x", "y"]}))
    assert evaluate.main(["--compare", folders[0], str(run)]) == 0
    assert "more seeds" not in capsys.readouterr().out
    assert evaluate.main(["--tables", str(cwd / "runs")]) == 0
    said = capsys.readouterr().out
    mean = np.mean([float(row["dice"]) for row in rows])
    (row,) = (line for line in said.splitlines() if line.startswith("| 3 ("))
    assert f"{mean:.2f} ± -" in row  # the paper has no 3 subjects
    command = "python finetune.py --init runs/mim-hearts --n-subjects 10 --seed 0"
    assert command in said.replace(f"{cwd}/", "")
    assert (cwd / "runs" / "tables" / "table1.csv").is_file()
    assert command in (cwd / "runs" / "tables" / "commands.sh").read_text().replace(f"{cwd}/", "")


def test_the_tables_of_an_empty_folder_are_the_commands_of_the_study(tmp_path, capsys):
    assert evaluate.main(["--tables", str(tmp_path / "runs"), "--data", "MnM", "MnM2"]) == 0
    lines = (tmp_path / "runs" / "tables" / "commands.sh").read_text().splitlines()
    assert len(lines) == 4 + 105 and all(line in capsys.readouterr().out for line in lines[:1])


def test_new_cines_are_predicted_without_labels(way, bivme, tmp_path, capsys, refused):
    cwd, _ = way
    run = cwd / "runs" / "finetune-mim-hearts-n3-seed0"
    scans = tmp_path / "scans"
    scans.mkdir()
    cine = nibabel.load(bivme / "bivme_patient1_sa.nii.gz")
    raw = np.asanyarray(cine.dataobj)
    nibabel.save(nibabel.Nifti1Image(raw[..., :6], cine.affine, cine.header), scans / "six.nii.gz")
    nibabel.save(nibabel.Nifti1Image(raw[..., 0], cine.affine), scans / "one.nii")
    checkpoint = ("--checkpoint", str(run))
    out = tmp_path / "out"
    assert (
        evaluate.main(["--predict", str(scans), *checkpoint, "--out", str(out), "--largest-component"]) == 0
    )
    (tmp_path / "scans" / "predicted").mkdir()
    for file in out.iterdir():
        shutil.copy(file, tmp_path / "scans" / "predicted")
    beside = ("predictions.json", "six_labels.nii.gz")
    for name in beside:
        shutil.copy(out / name, scans)
    found, odd = dataset.find([str(scans)], tmp_path / "cache")
    assert [s.id for s in found] == ["one", "six"] and [p.file for p in odd] == [".", "predicted"]
    for name in beside:
        (scans / name).unlink()
    assert {p.name for p in out.iterdir()} == {
        "clinical.csv", "predictions.json", "one_contours.png", "one_labels.nii.gz", "six.gif",
        "six_contours.png",
        "six_labels.nii.gz", "six_volumes.png",
    }  # fmt: skip
    labels = nibabel.load(out / "six_labels.nii.gz")
    assert labels.shape == (*cine.shape[:3], 6) and labels.get_data_dtype() == np.uint8
    assert (labels.affine == cine.affine).all() and labels.header.get_zooms() == cine.header.get_zooms()
    assert nibabel.load(out / "one_labels.nii.gz").shape == cine.shape[:3]
    found = np.asanyarray(labels.dataobj)
    assert set(np.unique(found)) <= {0, 1, 2, 3}
    rows = {row["cine"]: row for row in csv.DictReader((out / "clinical.csv").open())}
    voxel_ml = abs(np.linalg.det(cine.affine[:3, :3])) / 1000
    lv = (found == 1).sum(axis=(0, 1, 2)) * voxel_ml
    assert float(rows["six"]["lv_edv_ml"]) == pytest.approx(lv.max(), rel=1e-3)
    assert (int(rows["six"]["ed_frame"]), int(rows["six"]["es_frame"])) == (lv.argmax(), lv.argmin())
    assert rows["six"]["heart_rate_per_min"] == "" and "290" in rows["six"]["flags"]  # 60 / (6 * 0.03452)
    assert rows["one"]["lv_ef_percent"] == rows["one"]["lv_esv_ml"] == "" and rows["one"]["lv_edv_ml"] != ""
    capsys.readouterr()
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("A1B2C3_sa.nii", "stranger.nii"):
        shutil.copy(scans / "one.nii", mixed / name)
    assert evaluate.main(["--predict", str(mixed), *checkpoint, "--out", str(tmp_path / "mixed out")]) == 0
    assert "not predicted: left out: files that are not named as in" in capsys.readouterr().out
    assert (tmp_path / "mixed out" / "A1B2C3_labels.nii.gz").is_file()
    line = refused("evaluate.py", "--predict", mixed, *checkpoint, "--out", mixed)
    assert str(mixed) in line and "--out" in line
    line = refused("evaluate.py", "--predict", mixed, *checkpoint, "--out", mixed / "stranger.nii")
    assert "stranger.nii is no folder that can be written to" in line
    shutil.copy(mixed / "stranger.nii", os.fsencode(mixed) + b"/M\xfcller.nii")
    line = refused("evaluate.py", "--predict", mixed, *checkpoint, "--out", tmp_path / "none")
    assert "M\\udcfcller.nii': the name is not UTF-8; rename it" in line

    nibabel.save(nibabel.Nifti1Image(raw[:, :, 0, 0], cine.affine), tmp_path / "flat.nii.gz")
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "IM1.dcm").write_bytes(b"")
    (tmp_path / "IM2").write_bytes(b"")
    header = nibabel.Nifti1Header(nibabel.load(scans / "one.nii").header.binaryblock, check=False)
    for name in ("srow_x", "srow_y", "srow_z"):
        header[name] = 0
    header["pixdim"] = 1
    lost = bytearray((scans / "one.nii").read_bytes())
    lost[:348] = header.binaryblock
    (tmp_path / "lost.nii").write_bytes(lost)
    for what, words in (
        ("flat.nii.gz", "(256, 208)"),
        ("lost.nii", "pixdim"),
        ("dicom", "no cine found"),
        ("IM2", "expected .nii or .nii.gz files, or folders of them or of DICOM files"),
        ("absent.nii", "no such file"),
    ):
        line = refused("evaluate.py", "--predict", tmp_path / what, *checkpoint, "--out", tmp_path / "none")
        assert words in line, line
    names = {path.name for path in (tmp_path / "none").iterdir()}
    assert names == {"clinical.csv", "predictions.json"}  # the first says why, the second that no map is good
    line = refused("evaluate.py", "--predict", scans, "--checkpoint", cwd / "runs" / "mim-hearts")
    assert "expected a fine-tuned segmentation network, got one pretrained by mim" in line


def test_held_out_images_that_pretraining_has_seen_are_refused(way, phantom_folder, tmp_path, refused):
    """Also under other names: the whole data set again, every subject called otherwise."""
    cwd, _ = way
    other = shutil.copytree(phantom_folder, tmp_path / "other")
    for path in [*other.rglob("*_sa*.nii.gz")]:
        path.rename(path.with_name(f"again{path.name}"))
    common = ("--data", other, "--cache", tmp_path / "cache", "--epochs", 1)
    line = refused("finetune.py", "--init", cwd / "runs" / "mim-hearts", *common)
    assert "validation or test subjects have the images of subjects that the checkpoint has" in line
    assert not (tmp_path / "runs").exists()


def test_fine_tuning_on_chosen_phases_and_vendors(way, phantom_folder, tmp_path, refused, capsys):
    """Table 2 and table 3 of the paper: the labelled slices that are left, counted from the files."""
    cwd, _ = way
    rows = list(csv.DictReader(next(phantom_folder.glob("*.csv")).open()))
    vendor = {f"mnms/{row['External code']}": row["VendorName"] for row in rows}
    train = json.loads((cwd / "runs" / "mim-hearts" / "split.json").read_text())["train"]
    depth = {
        key: nibabel.load(next(phantom_folder.rglob(f"{key[5:]}_sa_gt.nii.gz"))).shape[2] for key in train
    }
    common = (
        "--init",
        cwd / "runs" / "mim-hearts",
        "--cache",
        cwd / "cache",
        "--epochs",
        1,
        "--batch-size",
        4,
    )
    name = vendor[train[0]]
    letter = {"Siemens": "A", "Philips": "B", "GE": "C", "Canon": "D"}[name]
    for out, words, expected in (
        ("ed", ("--phases", "ed"), sum(depth.values())),
        ("es", ("--phases", "es"), sum(depth.values())),
        ("one", ("--vendors", letter), 2 * sum(depth[k] for k in train if vendor[k] == name)),
    ):
        assert finetune.main([*map(str, (*common, "--out", tmp_path / out)), *words]) == 0
        said = capsys.readouterr().out
        assert f"slices to train on: {expected} labelled\n" in said
        assert torch.load(tmp_path / out / "unet.pt", weights_only=True)["provenance"]["slices"] == expected
    line = refused("finetune.py", *common, "--vendors", "Hitachi")
    assert "--vendors Hitachi" in line and name in line


def test_broken_subjects_are_all_named_or_left_out(phantom_folder, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(phantom_folder, tmp_path / "hearts")
    cines = sorted(folder.rglob("*_sa.nii.gz"))
    for path in cines[:2]:
        path.write_bytes(path.read_bytes()[:500])
    words = ["--method", "mim", "--data", folder, "--cache", "cache", *TINY, "--patch-size", 8, "--epochs", 1]
    _, errors = script(train_ssp, *words, cwd=tmp_path, expect=2)
    assert "2 of 8 subjects cannot be used" in errors and "Traceback" not in errors
    assert all(str(path) in errors for path in cines[:2]) and not (tmp_path / "runs").exists()
    monkeypatch.chdir(tmp_path)
    for labels in folder.rglob("*_gt.nii.gz"):
        labels.unlink()
    assert train_ssp.main([*map(str, words), "--skip-broken"]) == 0
    said = capsys.readouterr().out
    assert (
        "--init runs/mim-hearts --data FOLDER_WITH_LABELS" in said
    )  # finetune.py would find none in this one
    assert "left out" in said and all(str(path) in said for path in cines[:2])
    split = json.loads((tmp_path / "runs" / "mim-hearts" / "split.json").read_text())
    assert sum(map(len, split.values())) == 6


@pytest.mark.parametrize(
    ("method", "words", "owner"),
    [
        ("mim", ("--threshold", "0.1"), "pcl"),
        ("pcl", ("--mask-ratio=0.5",), "mim"),
        ("simclr", ("--threshold", "0.1"), "pcl"),
        ("mim", ("--export", "teacher"), "dino"),
    ],
)
def test_a_flag_of_another_method_names_it(refused, method, words, owner):
    line = refused("train_ssp.py", "--method", method, *words)
    assert f"{words[0]} belongs to --method {owner}, and --method is {method}" in line


SMALL_DINO = (
    "--outputs",
    "32",
    "--head-width",
    "16",
    "--local-crops",
    "2",
    "--freeze-last-epochs",
    "0",
    "--warmup-epochs",
    "0",
)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("simclr", ("--lr", "0.2")),
        ("pcl", ("--lr", "0.05")),
        ("mim", ("--patch-size", "12")),
        ("dino", ("--lr", "0.003", "--epochs", "8", *SMALL_DINO)),
    ],
)
def test_every_method_learns_and_opens_no_label(phantom_folder, tmp_path, method, words):
    network = ["--channels", "16", "32", "64", "64", "--image-size", "48", "--spacing", "4.5"]
    argv = [
        "--method",
        method,
        "--data",
        str(phantom_folder),
        "--cache",
        str(tmp_path / "cache"),
        *network,
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--out",
        str(tmp_path / "run"),
        *words,
    ]
    OPENED.clear()
    assert train_ssp.main(argv) == 0
    assert len({p for p in OPENED if p.endswith("_sa.nii.gz")}) == 8
    assert not [p for p in OPENED if "_gt" in p or p.endswith(".labels")]
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(records) >= 2 and all(1 <= r["effective_rank"] <= 64 for r in records)

    before, after = (
        loss_on_training_slices(argv, tmp_path, phantom_folder, trained) for trained in (False, True)
    )
    assert after < before - 0.02
    state = torch.load(tmp_path / "run" / "unet.pt", weights_only=True)["state_dict"]
    assert {k.split(".")[0] for k in state} == ({"encoder", "decoder"} if method == "mim" else {"encoder"})
    argv = [
        "--init",
        str(tmp_path / "run"),
        "--cache",
        str(tmp_path / "cache"),
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "fine"),
    ]
    assert finetune.main(argv) == 0


def loss_on_training_slices(argv, folder, hearts, trained):
    """The loss of the same views of all training slices, before or after training."""
    args, _ = train_ssp.parse(argv)
    torch.manual_seed(args.seed)
    method = flags.build(METHODS[args.method], args)
    if trained:
        method.load_state_dict(torch.load(folder / "run" / "last.pt", weights_only=True)["method"])
    cines = store.build(dataset.find([hearts], folder)[0], folder / "cache", labels=False)
    keys = json.loads((folder / "run" / "split.json").read_text())["train"]
    slices = Slices(cines, keys)
    batch = collate(cines, [slices.locate(i) for i in range(len(slices))], labelled=False)
    with torch.no_grad():
        return method(method.views(batch, step_generator(9, 9, 9)), 1.0)[0].item()


def test_a_training_that_cannot_fit_is_refused(refused, phantom_folder, way, monkeypatch, tmp_path):
    cwd, _ = way
    monkeypatch.setattr(memory, "capacity", lambda device: 5e6)
    line = refused(
        "train_ssp.py", "--method", "simclr", "--data", phantom_folder, "--cache", cwd / "cache", *TINY
    )
    assert "this training needs about" in line and "try --batch-size" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_full_gpu_is_one_line(error, capsys):
    def main(_):
        raise error

    with pytest.raises(SystemExit, match=r"^2$"):
        entry.end(main, "train_ssp.py")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_ssp.py: error: out of memory; try a smaller --batch-size")
    assert str(error).splitlines()[0] in line


def test_help_shows_the_methods_own_flags_and_defaults(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        train_ssp.main(["--method", "mim", "--help"])
    text = capsys.readouterr().out
    assert (
        "--mask-ratio" in text
        and "(default: 0.75)" in " ".join(text.split())
        and "(default: 128)" in " ".join(text.split())
    )


def test_real_patients_go_the_whole_way(acdc70, tmp_path, monkeypatch, capsys):
    """Four real patients, a tiny network: that it runs, not how well."""
    for patient in sorted(acdc70.iterdir())[:4]:
        (tmp_path / "acdc").mkdir(exist_ok=True)
        (tmp_path / "acdc" / patient.name).symlink_to(patient)
    common = ["--cache", "cache"]
    monkeypatch.chdir(tmp_path)
    words = ["--method", "mim", "--data", "acdc", *common, *TINY, "--patch-size", "8", "--epochs", "1"]
    assert train_ssp.main(words) == 0
    assert finetune.main(["--init", "runs/mim-acdc", *common, "--epochs", "1"]) == 0
    assert evaluate.main(["--split", "test", *common]) == 0
    assert "test split, 1 subjects" in capsys.readouterr().out
