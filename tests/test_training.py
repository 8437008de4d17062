import json
import math

import pytest
import torch
from loop import run_training, segmentation, settings

from cmrssp import training
from cmrssp.data import dataset, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.errors import UserError
from cmrssp.runs.folder import Run
from cmrssp.runs.settings import learning_rate
from cmrssp.ssp.mim import MIM

SMALL = {"channels": (4, 8, 8), "norm": "batch", "image_size": 32, "spacing_mm": 1.5}


@pytest.fixture
def loaders(write_mnms, beating, tmp_path):
    for i, id in enumerate("AB"):
        folder = write_mnms(id, *beating(i))
    cines = store.build(dataset.find([folder], tmp_path)[0], tmp_path / "cache", labels=True)

    def make(labelled, batch_size=4):
        return Batches(
            cines,
            Slices(cines, ["mnms/A", "mnms/B"], phases="both" if labelled else None),
            batch_size=batch_size,
            seed=4,
            labelled=labelled,
            device=torch.device("cpu"),
        )

    return make


def checked(method, epoch):
    return {"checked": epoch}


def test_schedules_by_hand():
    poly = settings(epochs=100, lr=0.01)
    assert [learning_rate(poly, e) for e in (0, 50)] == pytest.approx([0.01, 0.01 * 0.5**0.9])
    assert learning_rate(poly, 99.5) == pytest.approx(0.01 * 0.005**0.9)
    cosine = settings(epochs=100, lr=0.1, schedule="cosine")
    assert [learning_rate(cosine, e) for e in (0, 25, 50, 75)] == pytest.approx(
        [0.1, 0.05 * (1 + math.sqrt(0.5)), 0.05, 0.05 * (1 - math.sqrt(0.5))]
    )
    warm = settings(epochs=100, lr=0.0075, schedule="cosine", warmup_epochs=10, final_lr=1e-6)
    assert [learning_rate(warm, e) for e in (0, 1, 5, 10, 55, 100)] == pytest.approx(
        [0, 0.00075, 0.00375, 0.0075, (0.0075 + 1e-6) / 2, 1e-6]
    )
    assert learning_rate(settings(epochs=1, warmup_epochs=10), 0.5) == pytest.approx(
        0.025
    )  # cut off by the end


def test_the_loop_equals_plain_steps(loaders, tmp_path):
    """Against SGD with Nesterov momentum and weight decay written out, over three epochs."""
    torch.manual_seed(0)
    method = segmentation(**SMALL, augment=True)
    torch.manual_seed(0)
    slow = segmentation(**SMALL, augment=True).to(memory_format=torch.channels_last)
    loader = loaders(labelled=True)
    run = run_training(method, loader, tmp_path / "run", validate=checked)
    velocity = {name: torch.zeros_like(p) for name, p in slow.named_parameters()}
    losses = []
    for epoch in range(3):
        losses.append([])
        for step, batch in enumerate(loader.epochs(epoch, epoch + 1)):
            lr = 0.05 * (1 - (epoch + step / len(loader)) / 3) ** 0.9
            loss, _ = slow(slow.views(batch, training.step_generator(4, epoch, step)), 0.0)
            slow.zero_grad()
            loss.backward()
            losses[-1].append(loss.item())
            with torch.no_grad():
                for name, p in slow.named_parameters():
                    gradient = p.grad + 0.01 * p
                    velocity[name] = 0.9 * velocity[name] + gradient
                    p -= lr * (gradient + 0.9 * velocity[name])
    for (name, ours), theirs in zip(method.named_parameters(), slow.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5, name
    records = run.records()
    assert [r["loss"] for r in records] == pytest.approx([sum(x) / len(x) for x in losses], rel=1e-4)
    assert [r["checked"] for r in records] == [1, 2, 3] and len(loader) == 3


def test_what_a_run_leaves(loaders, tmp_path, capsys):
    method = MIM(**SMALL, augment=True, patch_size=8, mask_ratio=0.75)
    changes = {"validate": checked, "epochs": 5, "validate_every": 2}
    run = run_training(method, loaders(labelled=False), tmp_path / "run", **changes)
    assert [("checked" in r, r["epoch"]) for r in run.records()] == [
        (False, 1),
        (True, 2),
        (False, 3),
        (True, 4),
        (True, 5),
    ]
    unet, last = (torch.load(run.folder / name, weights_only=True) for name in ("unet.pt", "last.pt"))
    assert set(unet) == {"state_dict", "config", "provenance"} and unet["provenance"]["epochs"] == 5
    assert {k.split(".")[0] for k in unet["state_dict"]} == {"encoder", "decoder"}
    assert all(torch.equal(v, last["state_dict"][k]) for k, v in unet["state_dict"].items())
    assert last["epochs_done"] == 5 and len(last["optimizer"]["state"]) == len(list(method.parameters()))
    out = capsys.readouterr().out
    assert "5 epochs x 4 steps of 4 slices = 20 steps" in out and "estimated time: " in out
    assert not [p for p in run.folder.iterdir() if p.name.endswith(".tmp")]


def test_the_loss_falls(loaders, tmp_path):
    torch.manual_seed(0)
    run = run_training(
        segmentation(**SMALL, augment=False),
        loaders(labelled=True),
        tmp_path / "run",
        epochs=30,
        lr=0.02,
        weight_decay=0.0,
    )
    losses = [r["loss"] for r in run.records()]
    assert losses[-1] < 0.7 * losses[0]


def test_a_loss_that_is_not_finite_stops_the_run(loaders, tmp_path):
    method = MIM(**SMALL, augment=True, patch_size=8, mask_ratio=0.75)
    torch.nn.init.constant_(method.unet.heads[0].bias, float("inf"))
    with pytest.raises(
        UserError, match=r"epoch 1, step 1 of 4: not finite: loss (inf|nan), .* slices of mnms/A, mnms/B"
    ):
        run_training(method, loaders(labelled=False), tmp_path / "run")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_batches_without_any_foreground(write_mnms, beating, tmp_path):
    """Labels in one slice of three, batches of one: two of three hold background alone. The Dice loss of such
    a slice is 1 (there is nothing to overlap with), half of which counts.
    """
    cine, labels = beating(0)
    labels[:, :, 1:] = 0
    folder = write_mnms("A", cine, labels)
    cines = store.build(dataset.find([folder], tmp_path)[0], tmp_path / "cache", labels=True)
    one = Batches(cines, Slices(cines, ["mnms/A"], phases="both"), batch_size=1, seed=0, labelled=True,
                  device=torch.device("cpu"))  # fmt: skip
    foreground = [int(batch["label"].any()) for batch in one.epochs(0, 1)]
    assert len(foreground) == 6 and sum(foreground) == 2
    torch.manual_seed(0)
    method = segmentation(**SMALL, augment=True)
    run = run_training(method, one, tmp_path / "run", epochs=2, lr=0.001)
    records = run.records()
    assert all(0.5 * 4 / 6 < r["loss"] < 1.5 and math.isfinite(r["gradient_norm"]) for r in records)
    assert all(value.isfinite().all() for value in method.state_dict().values())


def test_bf16_on_a_cpu_follows_float32(loaders, tmp_path):
    losses = []
    for amp in ("off", "bf16"):
        torch.manual_seed(0)
        run = run_training(
            segmentation(**SMALL, augment=True), loaders(labelled=True), tmp_path / amp, amp=amp
        )
        losses.append([r["loss"] for r in run.records()])
    assert losses[1] == pytest.approx(losses[0], abs=2e-2) and losses[1] != losses[0]


def test_run_folders_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [Run.create(None, "mim-x").folder.name for _ in range(3)]
    assert names == ["mim-x", "mim-x-2", "mim-x-3"]
    first = Run.create(str(tmp_path / "typed"), "")
    first.start({"kind": "x"}, {})
    assert json.loads((first.folder / "args.json").read_text())["versions"]["torch"] == torch.__version__
    with pytest.raises(UserError, match="already holds a run"):
        Run.create(str(tmp_path / "typed"), "")
