import os
import pickle

import pytest
import torch

from cmrssp.data.prepare import refuse_trained
from cmrssp.errors import UserError
from cmrssp.unet import UNet
from cmrssp.weights import checkpoints
from cmrssp.weights.transfer import transfer

CHANNELS = (4, 8, 8)


def unet(num_outputs=4, num_heads=2, channels=CHANNELS, norm="batch"):
    return UNet(channels=channels, num_outputs=num_outputs, num_heads=num_heads, norm=norm)


def content(network, parts=("encoder", "decoder", "heads"), **provenance):
    state = {k: v for k, v in network.state_dict().items() if k.split(".")[0] in parts}
    return {
        "state_dict": state,
        "config": {"channels": list(CHANNELS), "image_size": 32, "spacing_mm": 1.5, "classes": None},
        "provenance": {
            "method": "mim",
            "data": ["phantom"],
            "split": {},
            "split_seed": 0,
            "seed": 0,
            "subjects": ["x/a"],
            **provenance,
        },
    }


def saved(tmp_path, *args, **kwargs):
    checkpoints.save(tmp_path / "unet.pt", content(*args, **kwargs))
    return checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("parts", "fresh"),
    [
        (("encoder",), {"decoder", "heads"}),
        (("encoder", "decoder"), {"heads"}),
        (("encoder", "decoder", "heads"), set()),
    ],
)
def test_what_transfers_and_what_stays(tmp_path, parts, fresh):
    source, target = unet(), unet()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    report = transfer(saved(tmp_path, source, parts), target)
    assert {part for part, what in report.items() if what.startswith("fresh")} == fresh
    assert {part for part, what in report.items() if what.startswith("transferred")} == set(parts)
    for key, value in target.state_dict().items():
        assert torch.equal(value, (before if key.split(".")[0] in fresh else source.state_dict())[key])


def test_a_bit_that_has_changed_is_noticed(tmp_path):
    some = saved(tmp_path, unet()).state_dict["encoder.stages.2.conv2.weight"]
    path = tmp_path / "unet.pt"
    whole = path.read_bytes()
    first = whole.index(some.numpy().tobytes())
    for place in range(first, first + some.nbytes, some.nbytes // 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError, match="got a damaged file"):
            checkpoints.read(path)
    path.write_bytes(whole)
    checkpoints.read(path)


def test_a_pickle_that_is_cut_off_anywhere_is_refused(tmp_path):
    whole = pickle.dumps({"state_dict": {}, "config": {"channels": [1, 2]}, "x": "provenance"}, 2)
    for length in range(len(whole)):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(UserError, match="expected a checkpoint of this package"):
            checkpoints.read(tmp_path / "cut.pt")


def test_heads_of_other_classes_stay_behind(tmp_path):
    report = transfer(saved(tmp_path, unet(num_outputs=1, num_heads=1)), unet())
    assert report["heads"].startswith("fresh (other classes")


@pytest.mark.parametrize("channels", [(4, 8), (4, 8, 16), (4, 8, 8, 8)])
def test_weights_that_do_not_fit_are_refused(tmp_path, channels):
    target = unet(channels=channels, num_heads=1)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(UserError, match=r"encoder does not fit this network .*has --channels 4 8 8"):
        transfer(saved(tmp_path, unet()), target)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize(("theirs", "ours"), [("batch", "instance"), ("instance", "batch")])
def test_another_norm_is_refused(tmp_path, theirs, ours):
    made = content(unet(norm=theirs))
    checkpoints.save(tmp_path / "unet.pt", {**made, "config": {**made["config"], "norm": theirs}})
    target = unet(norm=ours)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(UserError, match=f"was trained with --norm {theirs}, this network has --norm {ours}"):
        transfer(checkpoints.load(tmp_path), target)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    report = transfer(checkpoints.load(tmp_path), unet(norm=theirs))
    # two convolutions a stage with two tensors each and as many of the norm, batch norm with three more
    per_convolution = {"batch": 7, "instance": 4}[theirs]
    assert report["encoder"] == f"transferred, {3 * 2 * per_convolution} tensors"
    assert report["decoder"] == f"transferred, {2 * 2 * per_convolution + 2 * 2} tensors"


def test_a_file_that_names_no_norm_has_batch_norm(tmp_path):
    checkpoint = saved(tmp_path, unet())
    assert "norm" not in checkpoint.config and checkpoint.norm == "batch"
    assert transfer(checkpoint, unet())["encoder"] == "transferred, 42 tensors"


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_is_refused_without_being_run(tmp_path):
    torch.save(Hostile(str(tmp_path / "owned")), tmp_path / "bad.pt")
    with pytest.raises(UserError, match="expected a checkpoint of this package"):
        checkpoints.load(tmp_path / "bad.pt")
    assert not (tmp_path / "owned").exists()


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    checkpoints.save(tmp_path / "other.pt", {"weights": torch.ones(2)})
    checkpoints.save(tmp_path / "whole.pt", content(unet()))
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("text.pt", "expected a checkpoint"),
        ("other.pt", "expected a checkpoint"),
        ("half.pt", "expected a checkpoint"),
        ("none.pt", "no such checkpoint"),
        ("empty", "no such checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoints.load(tmp_path / name)


def test_subjects_seen_anywhere_in_the_history_are_refused(tmp_path):
    first = {"method": "pcl", "data": [], "split": {}, "split_seed": 0, "seed": 0, "subjects": ["x/b"]}
    checkpoint = saved(tmp_path, unet(), subjects=["x/a"], init=first)
    assert checkpoint.seen() == {"x/a": "mim", "x/b": "pcl"}
    refuse_trained(
        checkpoint, {"train": ["x/a", "x/b"], "validation": ["x/c"], "test": []}, ("validation", "test")
    )
    with pytest.raises(UserError, match=r"trained on 1 of the 2 test subjects \(pcl, the first is x/b\)"):
        refuse_trained(
            checkpoint, {"train": [], "validation": [], "test": ["x/b", "x/d"]}, ("validation", "test")
        )


def test_a_training_that_has_not_ended_says_so(tmp_path, capsys):
    of = {"subjects": [], "epochs": 16}
    half = saved(tmp_path, unet(), **of, hyperparameters={"epochs": 500})
    assert half.provenance.unfinished() == "16 of 500 epochs"
    assert "its training has not ended (16 of 500 epochs)" in capsys.readouterr().out
    assert saved(tmp_path, unet(), **of, hyperparameters={"epochs": 16}).provenance.unfinished() == ""
    assert saved(tmp_path, unet(), **of).provenance.unfinished() == ""


def test_the_same_content_gives_the_same_bytes(tmp_path):
    made = content(unet())
    checkpoints.save(tmp_path / "a.pt", made)
    checkpoints.save(tmp_path / "b.pt", made)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
