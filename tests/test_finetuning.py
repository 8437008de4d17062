"""How a pretrained encoder is treated: frozen at first, with a learning rate of its own, warmed up; and both
norms through the scripts.
"""

import copy
import importlib
import json
import re
import sys

import pytest
import torch
from loop import run_training, segmentation

import evaluate
import finetune
import train_ssp
from cmrssp import training
from cmrssp.cli import entry
from cmrssp.data import dataset, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.errors import UserError
from cmrssp.losses import deep_supervision, dice_cross_entropy

SMALL = {"channels": (4, 8, 8), "image_size": 32, "spacing_mm": 1.5, "augment": True, "norm": "batch"}


@pytest.fixture
def loader(write_mnms, beating, tmp_path):
    for i, id in enumerate("AB"):
        folder = write_mnms(id, *beating(i))
    cines = store.build(dataset.find([folder], tmp_path)[0], tmp_path / "cache", labels=True)
    slices = Slices(cines, ["mnms/A", "mnms/B"], phases="both")
    return Batches(cines, slices, batch_size=4, seed=4, labelled=True, device=torch.device("cpu"))


def network(**changes):
    torch.manual_seed(0)
    return segmentation(**{**SMALL, **changes})


def train(method, loader, folder, **changes):
    """The method's whole state after every epoch."""
    states = []

    def keep(method, epoch):
        states.append({k: v.clone() for k, v in method.state_dict().items()})
        return {}

    run_training(method, loader, folder, validate=keep, **changes)
    return states


def encoder(state):
    return {k: v for k, v in state.items() if k.startswith("unet.encoder.")}


def test_a_frozen_encoder_stays_bit_by_bit_and_learns_afterwards(loader, tmp_path):
    """Weights, running means and variances, and the count of batches."""
    method = network(freeze_encoder=2)
    before = copy.deepcopy(method.state_dict())
    first, second, third = train(method, loader, tmp_path / "run")
    assert len(encoder(before)) == 42
    for state in (first, second):
        assert all(torch.equal(v, before[k]) for k, v in encoder(state).items())
        changed = [k for k in state if k not in encoder(state) and not torch.equal(state[k], before[k])]
        assert len(changed) == len(state) - 42
    moved = {k.rpartition(".")[2] for k, v in encoder(third).items() if not torch.equal(v, before[k])}
    assert moved == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert third["unet.encoder.stages.0.norm1.num_batches_tracked"] == len(loader)  # of the third epoch


def test_freezing_equals_training_the_rest_alone(loader, tmp_path):
    """Nesterov SGD written out over decoder and heads, the encoder in evaluation mode; validation, which
    switches the modes, in between.
    """
    method = network(freeze_encoder=9)
    slow = network().to(memory_format=torch.channels_last)

    def validate(method, epoch):
        method.eval()
        method.train()
        return {}

    run_training(method, loader, tmp_path / "run", validate=validate)
    rest = [p for part in (slow.unet.decoder, slow.unet.heads) for p in part.parameters()]
    velocity = [torch.zeros_like(p) for p in rest]
    slow.encoder.requires_grad_(False).eval()
    for epoch in range(3):
        for step, batch in enumerate(loader.epochs(epoch, epoch + 1)):
            lr = 0.05 * (1 - (epoch + step / len(loader)) / 3) ** 0.9
            views = slow.views(batch, training.step_generator(4, epoch, step))
            features = slow.encoder(views["image"].contiguous(memory_format=torch.channels_last))
            decoded = slow.unet.decoder(features)
            outputs = [head(d) for head, d in zip(slow.unet.heads, decoded, strict=True)]
            loss = deep_supervision(dice_cross_entropy, outputs, views["label"])
            for p, v, g in zip(rest, velocity, torch.autograd.grad(loss, rest), strict=True):
                gradient = g + 0.01 * p.detach()
                v.mul_(0.9).add_(gradient)
                p.data.sub_(lr * (gradient + 0.9 * v))
    for (name, ours), theirs in zip(method.state_dict().items(), slow.state_dict().values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5, name


def test_the_encoders_learning_rate_and_the_warm_up(loader, tmp_path):
    """Plain SGD, by hand: the encoder at a tenth of the rate, the first epoch and a half a line from 0."""
    method = network(encoder_lr_factor=0.1)
    slow = network().to(memory_format=torch.channels_last)
    options = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "warmup_epochs": 1.5}
    train(method, loader, tmp_path / "run", **options)
    rates = []
    for epoch in range(3):
        for step, batch in enumerate(loader.epochs(epoch, epoch + 1)):
            now = epoch + step / len(loader)
            rates.append(0.05 * now / 1.5 if now < 1.5 else 0.05 * (1 - (now - 1.5) / 1.5) ** 0.9)
            loss, _ = slow(slow.views(batch, training.step_generator(4, epoch, step)), now)
            slow.zero_grad()
            loss.backward()
            with torch.no_grad():
                for name, p in slow.named_parameters():
                    p -= rates[-1] * (0.1 if name.startswith("unet.encoder.") else 1) * p.grad
    for (name, ours), theirs in zip(method.named_parameters(), slow.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5, name
    logged = [json.loads(line)["lr"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert logged == pytest.approx(rates[len(loader) - 1 :: len(loader)])
    assert rates[0] == 0 and len(rates) == 3 * len(loader)


def test_every_parameter_is_in_one_group():
    method = network(encoder_lr_factor=0.5)
    groups = method.param_groups(0.01)
    assert [g.get("lr_factor") for g in groups] == [0.5, None]
    assert all(g["weight_decay"] == 0.01 for g in groups)
    ids = [[id(p) for p in g["params"]] for g in groups]
    assert ids[0] == [id(p) for p in method.encoder.parameters()]
    assert sorted(ids[0] + ids[1]) == sorted(id(p) for p in method.parameters())
    assert len(network().param_groups(0.01)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"image_size": 4, "norm": "instance"}, "--image-size: .* at least 8 .*--norm instance")],
)
def test_impossible_settings(changes, message):
    with pytest.raises(UserError, match=message):
        network(**changes)


TINY = ("--channels", "4", "8", "8", "--image-size", "32", "--spacing", "6", "--epochs", "1")
OWN = {
    "mim": ("--patch-size", "8"),
    "simclr": (),
    "pcl": (),
    "dino": ("--outputs", "16", "--head-width", "16", "--local-crops", "2"),
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, phantom_folder):
    """{method: its run folder, with instance norm}"""
    folder = tmp_path_factory.mktemp("instance")
    runs = {method: folder / method for method in OWN}
    for method, words in OWN.items():
        argv = ["--method", method, "--norm", "instance", "--data", str(phantom_folder), *TINY, *words]
        argv += ["--batch-size", "8", "--cache", str(folder / "cache"), "--out", str(runs[method])]
        assert train_ssp.main(argv) == 0
    return runs


def test_instance_norm_goes_the_whole_way_with_every_method(pretrained, tmp_path, capsys):
    for method, run in pretrained.items():
        content = torch.load(run / "unet.pt", weights_only=True)
        assert content["config"]["norm"] == "instance"
        assert not [k for k in content["state_dict"] if "running" in k]
        common = ["--cache", str(run.parent / "cache"), "--out", str(tmp_path / method)]
        assert finetune.main(["--init", str(run), "--lr", "0.01", "--epochs", "1", *common]) == 0
        said = capsys.readouterr().out
        assert "encoder: transferred, 24 tensors" in said and ("did better" in said) == (method == "mim")
        made = torch.load(tmp_path / method / "unet.pt", weights_only=True)
        assert made["config"]["norm"] == "instance" and len(made["state_dict"]) == 24 + 20 + 4
    common = ["--cache", str(run.parent / "cache"), "--out", str(tmp_path / "scores")]
    assert evaluate.main(["--checkpoint", str(tmp_path / "mim"), *common]) == 0
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["settings"]["norm"] == "instance"


def test_the_transfer_is_in_args_json(pretrained, tmp_path, capsys):
    """And an encoder that is frozen to the end is the one that was pretrained."""
    run = pretrained["simclr"]
    words = ["--freeze-encoder", "5", "--encoder-lr-factor", "0.1", "--warmup-epochs", "1", "--epochs", "2"]
    words += ["--transfer", "all", "--resume", "auto"]
    common = ["--cache", str(run.parent / "cache"), "--out", str(tmp_path / "run")]
    assert finetune.main(["--init", str(run), *words, *common]) == 0
    report = {
        "encoder": "transferred, 24 tensors",
        "decoder": "fresh (the checkpoint has none), 20 tensors",
        "heads": "fresh (the checkpoint has none), 4 tensors",
    }
    said = capsys.readouterr().out
    assert all(f"{part}: {what}\n" in said for part, what in report.items())
    assert "did better with --transfer encoder --lr 0.01" in said
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["transfer"] == "all" and args["transferred"] == report
    assert args["freeze_encoder"] == 5 and args["encoder_lr_factor"] == 0.1
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in log] == [1, 2]
    content = torch.load(tmp_path / "run" / "unet.pt", weights_only=True)
    theirs = torch.load(run / "unet.pt", weights_only=True)["state_dict"]
    assert len(theirs) == 24 and all(torch.equal(content["state_dict"][k], v) for k, v in theirs.items())
    assert content["provenance"]["hyperparameters"]["freeze_encoder"] == 5
    assert content["provenance"]["hyperparameters"]["transfer"] == "all"
    assert content["provenance"]["hyperparameters"]["augment"] is True
    assert finetune.main(["--init", str(run), *words, *common]) == 0  # the same command, as after a requeue
    assert "already finished" in capsys.readouterr().out


def test_another_norm_ends_in_one_line(pretrained, tmp_path, monkeypatch, capsys):
    run = pretrained["mim"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--init", str(run), "--norm", "batch", "--out", "made"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        entry.end(importlib.import_module("finetune").main)
    assert end.value.code == 2 and capsys.readouterr().err.splitlines() == [
        f"finetune.py: error: {run / 'unet.pt'}: was trained with --norm instance, this network has --norm "
        "batch; leave --norm out, or pretrain with --norm batch"
    ]
    assert not (tmp_path / "made").exists()


SMALLEST = ("--quick", "--channels", "4", "8", "--image-size", "16", "--n-subjects", "2")


def test_quick_takes_1800_steps_however_few_the_subjects(phantom_folder, tmp_path, capsys):
    words = ["--data", str(phantom_folder), "--cache", str(tmp_path / "cache"), *SMALLEST, "--benchmark", "1"]
    assert finetune.main(words) == 0
    epochs, steps = re.search(r"(\d+) epochs x (\d+) steps", capsys.readouterr().out).groups()
    assert 1800 <= int(epochs) * int(steps) < 1800 + int(steps)


def test_a_class_that_is_never_found_is_named_at_the_end(phantom_folder, tmp_path, capsys):
    words = ["--data", str(phantom_folder), "--cache", str(tmp_path / "cache"), *SMALLEST, "--epochs", "1"]
    assert finetune.main([*words, "--lr", "1e-9", "--out", str(tmp_path / "run")]) == 0
    (last,) = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    lost = [name for name in ("LV", "MYO", "RV") if last[f"dice_{name}"] == 0]
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: a Dice")]
    assert lost and all(name in warning for name in lost) and int(warning.rpartition("--epochs ")[2]) > 4
