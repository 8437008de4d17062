import json

import numpy as np
import pytest
import torch

import train_ssp
from cmrssp.data import dataset, store
from cmrssp.data.batches import collate
from cmrssp.errors import UserError
from cmrssp.ssp.motion import Motion
from cmrssp.training import step_generator
from cmrssp.weights import checkpoints

SMALL = {"channels": (4, 8, 8), "norm": "batch", "image_size": 32, "spacing_mm": 1.5, "augment": True}


@pytest.fixture
def hearts(write_mnms, beating, tmp_path):
    """Three subjects of three frames; of C only one frame is kept."""
    for i, id in enumerate("ABC"):
        cine, labels = beating(i)
        folder = write_mnms(id, *((cine[..., :1], labels[..., :1]) if id == "C" else (cine, labels)))
    return store.build(dataset.find([folder], tmp_path)[0], tmp_path / "cache", labels=False)


def make(seed=0):
    torch.manual_seed(seed)
    return Motion(**SMALL)


def batch(hearts):
    return collate(hearts, [(0, 0, 0), (1, 2, 1)], labelled=False, motion=True)


def test_loss_equals_a_slow_loop(hearts):
    """Two heads, weights 2/3 and 1/3; the coarse target is the mean of 2 x 2 pixels."""
    method = make().eval()
    views = method.views(batch(hearts), step_generator(0, 0, 0))
    with torch.no_grad():
        fine, coarse = (output.double().numpy()[:, 0] for output in method.unet(views["image"]))
        loss, _ = method(views, 0.0)
    target = views["motion"][:, 0].double().numpy()
    errors = ([], [])
    for i, y, x in np.ndindex(2, 32, 32):
        errors[0].append((fine[i, y, x] - target[i, y, x]) ** 2)
    for i, y, x in np.ndindex(2, 16, 16):
        four = [target[i, 2 * y + a, 2 * x + b] for a in (0, 1) for b in (0, 1)]
        errors[1].append((coarse[i, y, x] - sum(four) / 4) ** 2)
    expected = 2 / 3 * sum(errors[0]) / len(errors[0]) + 1 / 3 * sum(errors[1]) / len(errors[1])
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_explained_variance_by_hand():
    """Targets 0 0 2 2 (sample variance 4/3), predicted 0 1 2 1: mean squared error 1/2, so 1 - 3/8."""
    method = make()
    predicted = torch.tensor([0.0, 1.0, 2.0, 1.0]).view(1, 1, 2, 2)
    method.outputs = lambda views: [predicted]
    target = torch.tensor([0.0, 0.0, 2.0, 2.0]).view(1, 1, 2, 2)
    loss, logs = method({"image": predicted, "motion": target}, 0.0)
    assert loss.item() == pytest.approx(0.5) and logs["explained_variance"].item() == pytest.approx(5 / 8)


def test_the_target_moves_with_the_image_whatever_its_intensities(hearts):
    method, seen = make(), batch(hearts)
    views = method.views(seen, step_generator(0, 0, 0))
    darker = method.views({**seen, "image": seen["image"] // 2}, step_generator(0, 0, 0))
    assert torch.equal(views["motion"], darker["motion"]) and not torch.equal(views["image"], darker["image"])
    other = method.views(seen, step_generator(0, 0, 1))
    assert not torch.equal(views["motion"], other["motion"])


def test_bf16_stays_near_float32(hearts):
    method = make()
    views = method.views(batch(hearts), step_generator(0, 0, 0))
    plain = method(views, 0.0)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(views, 0.0)[0]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain, rel=3e-2)


def test_encoder_and_decoder_transfer():
    assert {key.split(".")[0] for key in make().pretrained_state()} == {"encoder", "decoder"}


def test_cines_of_one_frame_are_left_out_and_named(hearts, capsys):
    assert make().usable(hearts, ["mnms/C", "mnms/A"]) == ["mnms/A"]
    said = capsys.readouterr().out
    assert "mnms/C" in said and "mnms/A" not in said


def test_a_pretraining_uses_moving_cines_and_logs_the_explained_variance(hearts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split = {"train": ["mnms/A", "mnms/C"], "validation": ["mnms/B"], "test": []}
    (tmp_path / "split.json").write_text(json.dumps(split))
    words = ["--method", "motion", "--data", "mnms", "--cache", "cache", "--split-file", "split.json",
             "--channels", "4", "8", "8", "--image-size", "32", "--spacing", "3", "--batch-size", "4",
             "--epochs", "1", "--out", "run"]  # fmt: skip
    assert train_ssp.main(words) == 0
    checkpoint = checkpoints.load(tmp_path / "run")
    assert checkpoint.seen() == {"mnms/A": "motion"}
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {"explained_variance", "validation_explained_variance", "validation_loss"} <= set(record)


def test_training_subjects_of_one_frame_alone_are_an_error_that_names_them(hearts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split = {"train": ["mnms/C"], "validation": ["mnms/B"], "test": ["mnms/A"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    words = ["--method", "motion", "--data", "mnms", "--cache", "cache", "--split-file", "split.json"]
    with pytest.raises(UserError, match="mnms/C"):
        train_ssp.main([*words, "--quick", "--out", "run"])
    assert not (tmp_path / "run").exists()
