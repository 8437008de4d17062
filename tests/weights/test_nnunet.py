"""Weights for nnU-Net v2: names and shapes against golden ones; and, where nnunetv2 is installed, loaded by
its own loader into the network that its own plan builds. To run these, in an environment of their own:
pip install -r requirements.txt nnunetv2 && python -m pytest tests/weights/test_nnunet.py -rs
"""

import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import golden_nnunet
import golden_unet
import pytest
import torch

from cmrssp.cli import entry
from cmrssp.ssp.dino import DINO
from cmrssp.ssp.mim import MIM
from cmrssp.ssp.pcl import PCL
from cmrssp.ssp.simclr import SimCLR
from cmrssp.unet import UNet
from cmrssp.weights import __main__ as exchange
from cmrssp.weights import checkpoints, nnunet

QUICK = golden_nnunet.CHANNELS
NORMS = ("batch", "instance")
IMAGE_SIZE = 64


def filled(norm, parts=("encoder", "decoder", "heads"), channels=QUICK):
    """A UNet with weights and running statistics that are none of an initialisation's."""
    unet = UNet(channels=channels, num_outputs=4, num_heads=len(channels) - 1, norm=norm).eval()
    with torch.no_grad():
        for key, value in unet.state_dict().items():
            if value.is_floating_point():
                value.copy_(golden_unet.fill(key, tuple(value.shape)))
    return unet, {k: v for k, v in unet.state_dict().items() if k.split(".")[0] in parts}


def saved(folder, state, norm="batch", method="mim", classes=None, channels=QUICK, name="unet.pt", **changes):
    folder.mkdir(exist_ok=True)
    config = {"channels": list(channels), "image_size": IMAGE_SIZE, "spacing_mm": 3.375, "classes": classes}
    provenance = {
        "method": method,
        "epochs": 3,
        "data": ["/data/MnM"],
        "split": {},
        "split_seed": 0,
        "seed": 0,
    }
    provenance |= {"subjects": ["mnms/A", "mnms/B"], "init": None}
    content = {"state_dict": state, "config": {**config, "norm": norm}, "provenance": provenance, **changes}
    checkpoints.save(folder / name, content)
    return folder / name


def exported(tmp_path, state, norm, **options):
    path = saved(tmp_path, state, norm, **options)
    said = exchange.to_nnunet(path, tmp_path / "out.pth")
    return torch.load(tmp_path / "out.pth", weights_only=True), said


def plain(key):
    """nnU-Net's name of a tensor without its twins."""
    key = key.removeprefix("decoder.") if key.startswith("decoder.encoder.") else key
    return key.replace("all_modules.0", "conv").replace("all_modules.1", "norm")


@pytest.mark.parametrize("norm", NORMS)
def test_every_key_of_nnunet_but_the_segmentation_layers(tmp_path, norm):
    _, state = filled(norm)
    content, said = exported(tmp_path, state, norm, classes=["LV", "MYO", "RV"], method="segmentation")
    golden = json.loads(golden_nnunet.GOLDEN.read_text())[norm]
    expected = {key: shape for key, shape in golden.items() if "seg_layers" not in key}
    ours = content["network_weights"]
    assert {key: list(value.shape) for key, value in ours.items()} == expected
    assert len(golden) - len(expected) == 6 and f"written: {tmp_path / 'out.pth'}, {len(ours)} keys" in said
    for key, value in ours.items():
        assert torch.equal(value, state[golden_unet.our_key(plain(key), len(QUICK) - 1)]), key
        assert value.is_contiguous()
    unique = {plain(key) for key in ours}
    assert len(unique) == len([k for k in state if not k.startswith("heads.")])
    assert "heads: left out, nnU-Net makes its own segmentation layers" in said
    assert f"trainer: {'nnUNetTrainerBN' if norm == 'batch' else 'nnUNetTrainer'}\n" in said
    twins = sum(value.nbytes for value in ours.values())
    assert (tmp_path / "out.pth").stat().st_size < 0.5 * twins  # the twins of a tensor are stored once


def fragment(said):
    """The printed plan fragment, parsed."""
    return json.loads("{" + re.search(r"data set:\n(.*?)\n\n", said, re.DOTALL)[1] + "}")


def test_the_printed_plan_is_that_of_the_network(tmp_path):
    _, said = exported(tmp_path, filled("batch")[1], "batch")
    plan = fragment(said)["2d_cmrssp"]
    assert plan["patch_size"] == [64, 64] and plan["spacing"] == [3.375, 3.375]
    assert plan["inherits_from"] == "2d" and plan["data_identifier"] == "nnUNetPlans_2d_cmrssp"
    network = plan["architecture"]["arch_kwargs"]
    assert network["features_per_stage"] == [16, 32, 64, 128] and network["n_stages"] == 4
    assert network["strides"] == [[1, 1], [2, 2], [2, 2], [2, 2]]
    assert network["kernel_sizes"] == [[3, 3]] * 4 and network["conv_bias"]
    assert network["n_conv_per_stage"] == [2, 2, 2, 2] and network["n_conv_per_stage_decoder"] == [2, 2, 2]
    for norm, norm_op in golden_nnunet.NORM_OPS.items():
        kwargs = nnunet.plan(channels=QUICK, norm=norm, image_size=64, spacing_mm=1.25)["architecture"][
            "arch_kwargs"
        ]
        assert kwargs["norm_op"] == norm_op and kwargs["norm_op_kwargs"] == {"eps": 1e-5, "affine": True}


@pytest.mark.parametrize("norm", NORMS)
def test_what_encoder_only_files_lack_starts_as_in_nnunet(tmp_path, norm):
    """Normal weights of std sqrt(2 / ((1 + 0.01^2) fan-in)), fan-in as torch counts it; biases 0."""
    _, state = filled(norm, parts=("encoder",))
    content, said = exported(tmp_path, state, norm, method="simclr")
    assert re.search(r"^decoder: fresh \(the checkpoint has none\).*initialised as nnU-Net does$", said, re.M)
    found = content["network_weights"]
    for key in ("decoder.stages.0.convs.0.conv", "decoder.transpconvs.0"):
        weight = found[f"{key}.weight"]
        expected = math.sqrt(2 / (1 + 0.01**2) / (weight[0].numel()))
        assert weight.std().item() == pytest.approx(expected, rel=0.02) and not found[f"{key}.bias"].any()
    assert torch.equal(found["decoder.stages.2.convs.1.norm.weight"], torch.ones(16))
    for key in (key for key in found if plain(key).startswith("encoder.")):
        assert torch.equal(found[key], state[golden_unet.our_key(plain(key), 3)])
    before, bytes_before = torch.get_rng_state(), (tmp_path / "out.pth").read_bytes()
    exchange.to_nnunet(tmp_path, tmp_path / "out.pth")
    assert (tmp_path / "out.pth").read_bytes() == bytes_before  # the same file gives the same export
    assert torch.equal(torch.get_rng_state(), before)


def flat(text):
    return dict(line.split(": ", 1) for line in text.splitlines())


def test_show_tells_what_a_file_is(tmp_path):
    _, state = filled("instance", parts=("encoder",))
    path = saved(tmp_path, state, "instance", method="pcl")
    said = flat(exchange.show(path))
    hashed = os.popen(f"sha256sum {path}").read().split()[0]
    assert (said["sha256"], said["method"], said["epochs"]) == (hashed, "pcl", "3")
    assert (said["data"], said["subjects seen"], said["norm"]) == ("/data/MnM", "2", "instance")
    assert said["channels"] == "16 32 64 128" and said["image"] == "64 px of 3.375 mm"
    assert said["what"] == "weights of a 2D U-Net, pretrained by pcl"
    assert said["encoder"].startswith("32 tensors") and "nnU-Net: encoder.*" in said["encoder"]
    assert said["decoder"] == said["heads"] == "not in the file, starts from random weights everywhere"
    exchange.to_nnunet(path, tmp_path / "out.pth")
    again = flat(exchange.show(tmp_path / "out.pth"))
    assert again["what"].startswith("weights for nnU-Net v2") and again["subjects seen"] == "2"
    assert again["decoder"].startswith("fresh") and again["encoder"] == "transferred, 32 tensors"


def test_show_follows_the_history(tmp_path):
    path = saved(tmp_path, filled("batch")[1], classes=["LV", "MYO", "RV"], method="segmentation")
    content = torch.load(path, weights_only=True)
    first = {**content["provenance"], "method": "mim", "epochs": 100, "subjects": ["mnms/C", "mnms/A"]}
    content["provenance"]["init"] = first
    checkpoints.save(path, {**content, "optimizer": {}})
    said = flat(exchange.show(tmp_path))
    assert (said["method"], said["epochs"], said["subjects seen"]) == (
        "segmentation after mim", "3 after 100", "3",
    )  # fmt: skip
    assert said["what"] == (
        "weights and training state of a 2D U-Net, trained to segment LV, MYO, RV, pretrained by mim"
    )
    assert said["heads"].startswith("6 tensors") and "nnU-Net: nowhere" in said["heads"]


@pytest.fixture
def line(capsys):
    """line(*words) -> the one line on stderr of a command that must end with 2."""

    def run(*words):
        with pytest.raises(SystemExit, match=r"^2$"):
            entry.end(lambda _: exchange.main([*map(str, words)]), exchange.PROG)
        said = capsys.readouterr()
        lines = said.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("python -m cmrssp.weights: error: "), said
        assert not said.out
        return lines[0]

    return run


def test_output_that_nobody_reads_to_its_end(tmp_path):
    """As into `| head -1`: no traceback, the status of a program that a closed pipe has ended."""
    path = saved(tmp_path, filled("batch")[1])
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "cmrssp.weights", "show", str(path)], cwd=Path(__file__).parents[2],
        stdout=write, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + 13, "")


def bad_files(folder):
    """{name: what the line must say} of files that are none of ours, as made here."""
    _, state = filled("batch")
    torch.save({"network_weights": state}, folder / "nnunet.pth")
    torch.save(state, folder / "bare.pt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "text.pt").write_text("these are no weights\n")
    (folder / "nothing.pt").write_bytes(b"")
    (folder / "pickle.pt").write_bytes(pickle.dumps({"epochs": 3}))
    torch.save({"state_dict": state, "when": print}, folder / "code.pt")
    (folder / "half.pt").write_bytes((folder / "bare.pt").read_bytes()[:5000])
    return {
        "nnunet.pth": "network_weights",
        "bare.pt": "encoder.stages.0.conv1.weight",
        "list.pt": "expected a checkpoint of this package (unet.pt or last.pt), got a damaged file",
        "text.pt": "got a damaged file",
        "nothing.pt": "got a damaged file",
        "pickle.pt": "got a damaged file",
        "code.pt": "or one that holds more than weights (no code was run)",
        "half.pt": "a damaged file",
        "absent.pt": "no such checkpoint",
    }


@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")
def test_files_that_cannot_be_used_end_in_one_line(tmp_path, line):
    for name, expected in bad_files(tmp_path).items():
        for words in (("show", tmp_path / name), ("export", "--to", "nnunet", tmp_path / name, "out.pth")):
            said = line(*words)
            assert str(tmp_path / name) in said and expected in said, said
    assert not (tmp_path / "out.pth").exists()


def test_an_output_that_cannot_be_written_ends_in_one_line(tmp_path, line):
    path = saved(tmp_path, filled("batch")[1])
    before = sorted(p.name for p in tmp_path.iterdir()), path.read_bytes()
    for out, expected in (
        (tmp_path / "absent" / "out.pth", "No such file or directory"),
        (path / "out.pth", "Not a directory"),
        (tmp_path, "ends in .pth"),
        (path, "ends in .pth"),
    ):
        said = line("export", "--to", "nnunet", path, out)
        assert str(out.parent) in said and expected in said, said
    assert (sorted(p.name for p in tmp_path.iterdir()), path.read_bytes()) == before


# The real packages, from here on.


@pytest.fixture
def nnunetv2():
    return pytest.importorskip("nnunetv2", reason="nnunetv2 is absent; it has an environment of its own")


def nnunets_network(said, classes=4):
    """What nnU-Net's plans machinery builds from the printed fragment, deep supervision on."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    basis = {"batch_size": 5, "patch_size": [256, 256], "spacing": [1.5, 1.5], "architecture": {}}
    plans = PlansManager({"plans_name": "nnUNetPlans", "configurations": {"2d": basis, **fragment(said)}})
    found = plans.get_configuration("2d_cmrssp")
    assert found.batch_size == 5 and found.patch_size == [IMAGE_SIZE] * 2 and found.spacing == [3.375] * 2
    torch.manual_seed(1)
    return get_network_from_plans(
        found.network_arch_class_name,
        found.network_arch_init_kwargs,
        found.network_arch_init_kwargs_req_import,
        1,
        classes,
        deep_supervision=True,
    )


def loaded(said, path, capsys):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    network = nnunets_network(said)
    load_pretrained_weights(network, str(path), verbose=True)
    assert "Loading pretrained weights from file" in capsys.readouterr().out
    return network


def largest_difference(network, unet, training):
    """Over the outputs of all scales on the same random images, with the segmentation layers of `network`."""
    heads = list(network.decoder.seg_layers)[::-1]
    for ours, theirs in zip(unet.heads, heads, strict=True):
        ours.load_state_dict(theirs.state_dict())
    image = torch.randn(3, 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        outputs = [net.train(training)(image) for net in (network, unet)]
    assert [o.shape for o in outputs[0]] == [o.shape for o in outputs[1]] and len(outputs[0]) == len(heads)
    assert min(o.abs().max() for o in outputs[0]) > 0.1
    return max((a - b).abs().max().item() for a, b in zip(*outputs, strict=True))


@pytest.mark.nnunet
@pytest.mark.parametrize("channels", [QUICK, (32, 64, 128, 256, 512, 512)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("heads", [False, True])
def test_nnunet_computes_the_same_at_all_scales(nnunetv2, tmp_path, capsys, norm, heads, channels):
    """`heads`: a fine-tuned network, whose heads nnU-Net does not take; its own ones are compared then."""
    parts = ("encoder", "decoder", "heads")[: 2 + heads]
    unet, state = filled(norm, parts, channels)
    options = {"method": "segmentation", "classes": ["LV", "MYO", "RV"]} if heads else {}
    _, said = exported(tmp_path, state, norm, channels=channels, **options)
    assert largest_difference(nnunets_network(said), unet, False) > 0.1  # before it is loaded
    network = loaded(said, tmp_path / "out.pth", capsys)
    found = {training: largest_difference(network, unet, training) for training in (False, True)}
    with capsys.disabled():
        print(f"\n{norm}, {len(channels)} stages, fine-tuned {heads}: largest difference {found}")
    assert max(found.values()) < 1e-5


@pytest.mark.nnunet
@pytest.mark.parametrize("norm", NORMS)
def test_nnunet_takes_the_encoders_of_every_method(nnunetv2, tmp_path, capsys, norm):
    common = {"channels": QUICK, "image_size": IMAGE_SIZE, "spacing_mm": 3.375, "augment": True, "norm": norm}
    head = {"temperature": 0.1, "projection": 8}
    temperatures = {
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
        "teacher_temperature_start": 0.02,
    }
    dino = {
        "epochs": 3,
        "local_size": 32,
        "local_crops": 2,
        "outputs": 8,
        "hidden": 8,
        "centre_momentum": 0.9,
    }
    dino |= {"teacher_momentum": 0.99, "teacher_temperature_epochs": 1, "freeze_last_epochs": 1}
    for method in (
        SimCLR(**common, **head),
        PCL(**common, **head, threshold=0.1),
        DINO(**common, **dino, **temperatures, export="teacher"),
        MIM(**common, patch_size=16, mask_ratio=0.75),
    ):
        with torch.no_grad():
            for key, value in method.encoder.state_dict().items():
                if value.is_floating_point():
                    value.copy_(golden_unet.fill(key, tuple(value.shape)))
        _, said = exported(tmp_path, method.pretrained_state(), norm, method=method.name)
        assert ("decoder: fresh" in said) == (method.name != "mim")
        network = loaded(said, tmp_path / "out.pth", capsys).eval()
        image = torch.randn(2, 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(6))
        encoder = method.teacher_encoder if method.name == "dino" else method.encoder
        with torch.no_grad():
            pairs = list(zip(network.encoder(image), encoder.eval()(image), strict=True))
            assert all(o.isfinite().all() for o in network(image))
        assert max((a - b).abs().max().item() for a, b in pairs) < 1e-5 and len(pairs) == len(QUICK)
