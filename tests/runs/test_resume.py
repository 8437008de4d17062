"""A run that was interrupted, wherever and however, ends as one that was not."""

import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from loop import run_training, segmentation, settings
from processes import Script

import finetune
import train_ssp
from cmrssp.cli import flags
from cmrssp.data import __main__ as data_report
from cmrssp.data import dataset, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.errors import UserError
from cmrssp.runs.folder import Run
from cmrssp.runs.progress import Progress
from cmrssp.runs.signals import Stopped
from cmrssp.ssp import METHODS
from cmrssp.weights import checkpoints

CLOCKS = ("slices_per_s", "seconds", "validation_s")
SETTINGS = {"schedule": "cosine", "warmup_epochs": 0.5, "validate_every": 2}
TINY = ["--channels", "4", "8", "8", "--image-size", "32", "--spacing", "6", "--patch-size", "8"]


def logged(folder: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in Run(folder).records()]


def assert_same(one: Path, other: Path) -> None:
    """Weights, optimiser, everything that is saved, bit by bit; the log without its clocks."""
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (one, other))
    assert (one / "unet.pt").read_bytes() == (other / "unet.pt").read_bytes()

    def compare(x, y, where: str) -> None:
        assert type(x) is type(y), where
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), where
        elif isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for key in x:
                compare(x[key], y[key], f"{where}.{key}")
        elif isinstance(x, list):
            assert len(x) == len(y), where
            for i, (left, right) in enumerate(zip(x, y, strict=True)):
                compare(left, right, f"{where}[{i}]")
        else:
            assert x == y, where

    compare(a, b, "last.pt")
    assert logged(one) == logged(other) != []


class Interrupting(Batches):
    """Sends this process a signal before it hands out one batch."""

    def __init__(self, *words, at: tuple[int, int], **named) -> None:
        super().__init__(*words, **named)
        self.at = at

    def epochs(self, first: int, end: int, step: int = 0):
        for number, batch in enumerate(super().epochs(first, end, step), first * len(self) + step):
            if divmod(number, len(self)) == self.at:
                os.kill(os.getpid(), signal.SIGUSR1)
            yield batch


OWN = {
    "simclr": ["--projection", "16"],
    "pcl": ["--projection", "16", "--threshold", "0.4"],
    "mim": ["--patch-size", "8"],
    "motion": [],
    "dino": ["--local-size", "16", "--local-crops", "2", "--outputs", "32", "--head-width", "16"],
}


def make(name: str):
    if name == "segmentation":
        return segmentation(channels=(4, 8, 8), image_size=32, augment=True)
    words = [
        "--method",
        name,
        "--channels",
        "4",
        "8",
        "8",
        "--image-size",
        "32",
        "--spacing",
        "1.5",
        *OWN[name],
    ]
    return flags.build(METHODS[name], train_ssp.parse(words)[0])


@pytest.mark.parametrize("name", [*OWN, "segmentation"])
def test_a_resumed_training_equals_an_unbroken_one(name, write_mnms, beating, tmp_path):
    """Stopped in the first step, in the middle of an epoch, in the last step of all."""
    for i, id in enumerate("AB"):
        folder = write_mnms(id, *beating(i))
    cines = store.build(dataset.find([folder], tmp_path)[0], tmp_path / "cache", labels=True)
    labelled = name == "segmentation"
    slices = Slices(cines, ["mnms/A", "mnms/B"], phases="both" if labelled else None)
    size = 3 if labelled else 4

    def train(out: str, at=(-1, -1), state=None) -> Path:
        torch.manual_seed(0 if state is None else 99)  # what is loaded must not depend on the initial weights
        loader = Interrupting(
            cines, slices, batch_size=size, seed=4, labelled=labelled, motion=name == "motion",
            device=torch.device("cpu"), at=at,
        )  # fmt: skip
        assert len(loader) == 4
        run_training(make(name), loader, tmp_path / out, validate=checked, state=state, **SETTINGS)
        return tmp_path / out

    def checked(method, epoch):
        return {"checked": epoch}

    whole = train("whole")
    for epoch, step in ((0, 0), (1, 1), (2, 3)):
        out, message = f"broken{epoch}", f"SIGUSR1 and saved after epoch {epoch}, step {step + 1}; go on with"
        with pytest.raises(Stopped, match=message):
            train(out, (epoch, step))
        state = checkpoints.read(tmp_path / out / "last.pt")
        assert (state["epochs_done"], state["steps_done"]) == (epoch, step + 1)
        assert_same(whole, train(out, state=state))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, phantom_folder):
    """(folder, words) of a finished pretraining of 12 epochs; the words start the same one again."""
    cwd = tmp_path_factory.mktemp("resume")
    words = ["--method", "mim", "--data", str(phantom_folder), "--cache", str(cwd / "cache"), *TINY,
             "--epochs", "12", "--batch-size", "8", "--save-every", "1",
             "--validate-every", "4"]  # fmt: skip
    assert train_ssp.main([*words, "--out", str(cwd / "whole")]) == 0
    return cwd, words


def start(words: list, cwd: Path, **options) -> Script:
    return Script(train_ssp.main, *words, name="train_ssp.py", cwd=cwd, **options)


def signal_at(number: int, event: str, part: str, count: int = 1) -> None:
    """From here on this process gets a signal at the count-th `event` on a file with `part` in its path."""
    left = [count]

    def hook(name: str, args: tuple) -> None:
        if name == event and part in str(args[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


SAVING, LOGGING = ("os.rename", ".last.pt."), ("open", "log.jsonl")


def test_a_signal_ends_with_a_checkpoint_and_the_command_that_goes_on(undisturbed, tmp_path):
    cwd, words = undisturbed
    out = tmp_path / "run"
    prepare = partial(signal_at, signal.SIGTERM, *LOGGING, 3)
    status, _, errors = start([*words, "--out", out], tmp_path, prepare=prepare).end()
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM and saved after epoch" in errors
    assert f"go on with: python train_ssp.py --resume {out}" in errors
    assert not (out / "unet.pt").exists() and "Traceback" not in errors
    assert train_ssp.main(["--resume", str(out)]) == 0  # no other flag
    assert_same(cwd / "whole", out)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_go_on_to_the_same_end(undisturbed, tmp_path, kills):
    """Every other kill falls between a checkpoint's writing and its renaming, the others to the log."""
    cwd, words = undisturbed
    out, draw, killed = tmp_path / "run", random.Random(kills), 0
    words = [*words, "--out", out, "--resume", "auto"]
    for number in range(kills):
        prepare = partial(signal_at, signal.SIGKILL, *(SAVING, LOGGING)[number % 2], draw.randint(1, 2))
        killed += start(words, tmp_path, prepare=prepare).end()[0] == -signal.SIGKILL
        if (out / "last.pt").exists():
            checkpoints.read(out / "last.pt")  # whole, or not there
    status, _, errors = start(words, tmp_path).end()
    assert status == 0, errors
    assert killed >= 3
    assert_same(cwd / "whole", out)


@pytest.fixture(scope="module")
def interrupted(undisturbed):
    """The run as a SIGINT has left it, after its third epoch."""
    cwd, words = undisturbed
    out = cwd / "interrupted"
    prepare = partial(signal_at, signal.SIGINT, *LOGGING, 3)
    assert start([*words, "--out", out], cwd, prepare=prepare).end()[0] == 128 + signal.SIGINT
    return out


@pytest.fixture
def stopped(undisturbed, interrupted, tmp_path):
    """The folder of the undisturbed run, the words that started it, and a copy of the interrupted one."""
    return *undisturbed, shutil.copytree(interrupted, tmp_path / "stopped")


def test_what_may_not_go_on_is_refused_by_name(stopped, phantom_folder, tmp_path, capsys, monkeypatch):
    cwd, words, out = stopped
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    unsaved = shutil.copytree(out, tmp_path / "unsaved", ignore=shutil.ignore_patterns("*.pt"))
    damaged = shutil.copytree(out, tmp_path / "damaged")
    (damaged / "args.json").write_text("[")
    for typed, message in (
        (["--resume", damaged], "expected a pretraining, got a damaged args.json"),
        (["--resume", out, "--lr", "0.5"], "--lr: the run in .* was started with 0.01, got 0.5"),
        (["--resume", out, "--epochs", "40"], "--epochs: .* with 12, got 40"),
        (["--resume", out, "--method", "pcl", "--threshold", "0.1"], "--method: .* with mim, got pcl"),
        (["--resume", tmp_path / "nowhere"], "expected the folder of a run, with args.json"),
        (["--resume", out, "--out", tmp_path / "other"], "a resumed run stays in its folder"),
        (["--resume", unsaved], "unsaved: nothing was saved to go on from"),
        (["--method", "mim", "--resume", "auto"], "--resume auto: needs --out"),
        ([*words, "--out", out], "already holds a run; .* or add --resume auto"),
    ):
        with pytest.raises(UserError, match=message):
            train_ssp.main([*map(str, typed)])
    with pytest.raises(UserError, match="expected a fine-tuning, got a pretraining"):
        finetune.main(["--resume", str(out)])
    holder = Run(out)
    holder.lock()
    status, _, errors = start(["--resume", out], tmp_path).end()
    assert status == 2 and errors.strip().endswith("another process is training in this run folder")
    holder._lock.close()
    # a data set whose images have changed since
    moved = shutil.copytree(phantom_folder, tmp_path / "hearts")
    train = json.loads((out / "split.json").read_text())["train"]
    path = next(moved.rglob(f"{train[0].split('/')[1]}_sa.nii.gz"))
    path.write_bytes(next(moved.rglob(f"{train[1].split('/')[1]}_sa.nii.gz")).read_bytes())
    with pytest.raises(UserError, match="cines have changed since"):
        train_ssp.main(["--resume", str(out), "--data", str(moved)])
    path.unlink()
    with pytest.raises(UserError, match="cines have changed since, or some are gone"):
        train_ssp.main(["--resume", str(out), "--data", str(moved)])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    # and one that has only moved goes on
    capsys.readouterr()
    moved = shutil.copytree(phantom_folder, tmp_path / "elsewhere")
    begun = json.loads((out / "args.json").read_text())
    (out / "args.json").write_text(json.dumps({**begun, "device": "cuda:1"}))
    assert train_ssp.main(["--resume", str(out), "--data", str(moved), "--save-every", "3"]) == 0
    said = capsys.readouterr().out
    assert "going on after epoch" in said and "started on cuda:1, going on with cpu" in said
    assert_same(cwd / "whole", out)
    assert train_ssp.main([*words, "--out", str(out), "--resume", "auto"]) == 0
    assert f"already finished: {out / 'unet.pt'}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--data: .*hearts"):
        train_ssp.main([*words, "--out", str(out), "--resume", "auto", "--data", str(tmp_path / "others")])
    # unet.pt comes last of all: a run that ended just before it gets all that is missing
    views, curves, weights_file = (out / name for name in ("views.png", "curves.png", "unet.pt"))
    assert weights_file.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in (views, curves))
    before = views.read_bytes()
    for path in (views, curves, weights_file):
        path.unlink()
    assert train_ssp.main(["--resume", str(out), "--data", str(moved)]) == 0
    assert_same(cwd / "whole", out)
    assert curves.is_file() and views.read_bytes() == before


def test_a_damaged_checkpoint_is_named(stopped):
    _, _, out = stopped
    last = out / "last.pt"
    last.write_bytes(last.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"last\.pt: .* a damaged file"):
        train_ssp.main(["--resume", str(out)])


def test_temporary_files_of_a_killed_run_are_removed(stopped):
    cwd, _, out = stopped
    (out / ".last.pt.1.tmp").write_bytes(b"half")
    assert train_ssp.main(["--resume", str(out)]) == 0
    assert_same(cwd / "whole", out)
    assert not list(out.glob(".*.tmp"))


def test_labels_that_have_changed_are_refused(phantom_folder, tmp_path, monkeypatch):
    """Of a subject that is trained on, or that validates; exchanged, or gone."""
    hearts = shutil.copytree(phantom_folder, tmp_path / "hearts")
    words = ["--data", str(hearts), "--cache", str(tmp_path / "cache"), *TINY[:-2], "--n-subjects", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "Batches", partial(Interrupting, at=(0, 1)))
        with pytest.raises(Stopped):
            finetune.main([*words, "--batch-size", "4", "--epochs", "2", "--out", str(tmp_path / "run")])
    provenance = checkpoints.read(tmp_path / "run" / "last.pt")["provenance"]
    for key in (provenance["subjects"][0], provenance["split"]["validation"][0]):
        path = next(hearts.rglob(f"{key.split('/')[1]}_sa_gt.nii.gz"))
        before = path.read_bytes()
        image = nibabel.load(path)
        exchanged = np.array([0, 3, 2, 1], np.uint8)[np.asanyarray(image.dataobj)]
        nibabel.save(nibabel.Nifti1Image(exchanged, image.affine, image.header), path)
        with pytest.raises(UserError, match="its labels have changed since, or some are gone"):
            finetune.main(["--resume", str(tmp_path / "run")])
        path.unlink()
        with pytest.raises(UserError, match="its labels have changed since, or some are gone"):
            finetune.main(["--resume", str(tmp_path / "run")])
        path.write_bytes(before)
    assert finetune.main(["--resume", str(tmp_path / "run")]) == 0


def test_a_signal_before_the_training_leaves_nothing_half_written(phantom_folder, tmp_path):
    words = ["--method", "mim", "--data", phantom_folder, "--cache", "cache", *TINY]
    prepare = partial(signal_at, signal.SIGTERM, "open", ".cine")
    status, _, errors = start(words, tmp_path, prepare=prepare).end()
    assert status == 128 + signal.SIGTERM and "Traceback" not in errors
    assert errors.strip().endswith("train_ssp.py: ended by SIGTERM")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_leaves_the_older_checkpoint(stopped, tmp_path):
    """No file may grow beyond 20 kB: less than a checkpoint, more than the log."""
    cwd, _, out = stopped
    before = (out / "last.pt").read_bytes()
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20000, 20000))
    status, _, errors = start(["--resume", out], tmp_path, prepare=limit).end()
    lines = [line for line in errors.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1 and "Traceback" not in errors
    assert "cannot be written, the disk may be full" in lines[0] or "File too large" in lines[0]
    assert (out / "last.pt").read_bytes() == before and not list(out.glob(".*.tmp"))
    assert train_ssp.main(["--resume", str(out)]) == 0
    assert_same(cwd / "whole", out)


def test_two_processes_build_one_store(phantom_folder, tmp_path):
    words = (phantom_folder, "--cache", "cache")
    both = [Script(data_report.main, *words, name="data", cwd=tmp_path) for _ in range(2)]
    ends = [process.end() for process in both]
    assert [status for status, _, _ in ends] == [0, 0], ends
    said = [out for _, out, _ in ends]
    assert all("cines: 8 subjects" in text for text in said)
    subjects, _ = dataset.find([phantom_folder], tmp_path)
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "store").iterdir()}
    assert len(files) == 16
    store.build(subjects, tmp_path / "cache", labels=True)
    assert {
        p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "store").iterdir()
    } == files  # all valid


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("hacked",))


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, monkeypatch, phantom_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile()))
    buffer = io.BytesIO()
    torch.save({"state_dict": Hostile()}, buffer)
    (tmp_path / "zipped.pt").write_bytes(buffer.getvalue())
    for name in ("plain.pt", "zipped.pt"):
        with pytest.raises(UserError, match="expected a checkpoint of this package"):
            finetune.main(["--init", name, "--data", str(phantom_folder)])
    assert not (tmp_path / "hacked").exists()


class FewSteps:
    """What Progress asks of its batches."""

    batch_size, device = 2, torch.device("cpu")

    def __init__(self) -> None:
        self.store = type("Names", (), {"index": {"mnms/A": 0, "mnms/B": 1}})()

    def __len__(self) -> int:
        return 10


@pytest.mark.parametrize(("words", "suggested"), [([], True), (["--quick"], False)])
def test_quick_is_suggested_for_a_long_training_without_it(words, suggested):
    args, _ = train_ssp.parse(["--method", "mim", *words])
    assert ("--quick" in flags.settings(args, FewSteps()).hint) is suggested


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run():
    fp16 = settings(amp="fp16", max_skipped=2)
    meter = Progress(FewSteps(), fp16)
    meter.start_epoch(0)
    fine, bad = torch.tensor(2.0), torch.tensor(float("inf"))
    for norm in (bad, fine, bad, bad, fine):
        meter.update({"loss": fine, "gradient_norm": norm}, torch.tensor([0, 1]))
    record = meter.end_epoch()
    assert (record["loss"], record["gradient_norm"], record["non_finite_steps"]) == (2.0, 2.0, 3)
    meter.start_epoch(1)
    for norm in (fine, bad, bad, bad):
        meter.update({"loss": fine, "gradient_norm": norm}, torch.tensor([1, 1]))
    with pytest.raises(
        UserError,
        match=r"epoch 2, step 4 of 10: not finite: gradient_norm inf, 3 times in a row .* slices of mnms/B\.",
    ):
        meter.read()


def test_an_epoch_of_one_step_may_skip_it():
    meter = Progress(FewSteps(), settings(amp="fp16", max_skipped=2))
    bad = torch.tensor(float("inf"))
    meter.start_epoch(0)
    meter.update({"loss": torch.tensor(2.0), "gradient_norm": bad}, torch.tensor([0]))
    record = meter.end_epoch()
    assert record["non_finite_steps"] == 1 and not {"loss", "gradient_norm"} & set(record)


def test_skipped_steps_in_a_row_are_counted_across_a_resume_between_epochs():
    fp16 = settings(amp="fp16", max_skipped=2)
    bad, subjects = torch.tensor(float("inf")), torch.tensor([0, 1])
    meter = Progress(FewSteps(), fp16)
    meter.start_epoch(0)
    for loss in (torch.tensor(1.0), bad, bad):
        meter.update({"loss": loss, "gradient_norm": loss}, subjects)
    meter.end_epoch()
    again = Progress(FewSteps(), fp16)
    again.load_state_dict(meter.state_dict(), 10)
    for either in (meter, again):
        either.start_epoch(1)
        either.update({"loss": bad, "gradient_norm": bad}, subjects)
        with pytest.raises(UserError, match="3 times in a row"):
            either.read()


def test_a_gradient_that_is_not_finite_is_not_saved():
    meter = Progress(FewSteps(), settings())
    meter.start_epoch(0)
    meter.update(
        {"loss": torch.tensor(1.0), "gradient_norm": torch.tensor(float("nan"))}, torch.tensor([0, 1])
    )
    with pytest.raises(
        UserError, match=r"step 1 of 10: not finite: gradient_norm nan; .* slices of mnms/A, mnms/B\."
    ):
        meter.read()
