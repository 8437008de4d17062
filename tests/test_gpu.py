"""What only a GPU can show: python -m pytest -n 8 tests/test_gpu.py (--slow: also what compiles).

Skipped where there is none.
"""

import copy
from functools import partial

import loop
import pytest
import torch
import two_processes
from test_distributed import torchrun
from test_resume import Interrupting, assert_same
from test_unet import as_written, make_stages

import finetune
import train_ssp
from cmrssp import augmentation
from cmrssp.data import phantom
from cmrssp.data.batches import Batches, Slices
from cmrssp.runs.signals import Stopped
from cmrssp.training import Step, step_generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
GPU = torch.device("cuda")
KINK = 0.05  # of a gradient: one value that rounding moves across the bend of a leaky ReLU changed 0.016
SETTINGS = {"epochs": 2, "lr": 0.01, "schedule": "cosine"}


@pytest.fixture(scope="module")
def hearts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    phantom.write(folder / "hearts", num_subjects=8, num_frames=3, max_slices=3, max_matrix=96)
    return two_processes.make_store(folder / "hearts", folder / "cache")


def batches(cines, device, labelled=True):
    slices = Slices(cines, sorted(cines.index), phases="both" if labelled else None)
    return Batches(cines, slices, batch_size=8, seed=4, labelled=labelled, device=device, motion=True)


@pytest.mark.parametrize("on_device", [False, True])
def test_the_same_batches_as_on_a_cpu(hearts, on_device):
    loader = batches(hearts, GPU)
    if on_device:
        loader.keep_on_device()
        assert loader.on_device is not None
    expected = batches(hearts, torch.device("cpu")).epochs(0, 2)
    for ours, theirs in zip(loader.epochs(0, 2), expected, strict=True):
        assert ours.keys() == theirs.keys() and ours["image"].device.type == "cuda"
        for key, value in ours.items():
            assert torch.equal(value.cpu().nan_to_num(-9), theirs[key].nan_to_num(-9)), key


def test_the_same_views_as_on_a_cpu(hearts):
    """Noise apart, which each device draws for itself."""
    ranges = augmentation.Ranges(p_noise=0.0, p_blur=0.5, p_solarise=0.5)
    views = []
    for device in (torch.device("cpu"), GPU):
        batch, generator = next(batches(hearts, device).in_order()), step_generator(0, 0, 0)
        views.append(augmentation.augment(batch, [ranges], generator, image_size=64, spacing_mm=3.0))
    assert (views[0]["image"] - views[1]["image"].cpu()).abs().max() < 1e-3
    assert (views[0]["label"] != views[1]["label"].cpu()).float().mean() < 1e-3  # at a border of two pixels


@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
@pytest.mark.parametrize("name", two_processes.NAMES)
def test_a_step_never_waits_for_the_device(hearts, name, amp):
    step = Step(two_processes.make_method(name), batches(hearts, GPU), loop.settings(**SETTINGS, amp=amp))
    batch = next(step_batches := batches(hearts, GPU).epochs(0, 1))
    for number in range(2):
        step(batch, 0, number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(batch, 0, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        step_batches.close()
    assert found["loss"].isfinite()


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("training", [True, False])
def test_a_stage_gives_what_its_layers_give_one_by_one(norm, training):
    """In float64, as on a CPU, in the memory format of the training."""
    stages = [stage.to(GPU, memory_format=torch.channels_last).train(training) for stage in make_stages(norm)]
    image = torch.randn(4, 3, 16, 16, dtype=torch.float64, device=GPU)
    image = image.contiguous(memory_format=torch.channels_last)
    results = []
    for stage, forward in zip(stages, (stages[0], partial(as_written, stages[1])), strict=True):
        output = forward(image)
        output.square().mean().backward()
        results.append([output, *stage.buffers(), *(p.grad for p in stage.parameters())])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() < 1e-6


def test_crops_of_one_pass_equal_those_made_one_by_one(hearts):
    method, batch = two_processes.make_method("dino"), next(batches(hearts, GPU, labelled=False).in_order())
    found = method.views(batch, step_generator(0, 0, 0))
    first, second, local = method.crop_ranges()
    generator = step_generator(0, 0, 0)
    for crop, ranges in zip(
        (*found["global"].chunk(2), *found["local"].chunk(method.local_crops)),
        (first, second, *[local] * method.local_crops),
        strict=True,
    ):
        size = {"image_size": crop.shape[-1], "spacing_mm": method.spacing_mm}
        expected = augmentation.augment(batch, [ranges], generator, **size)["image"]
        assert (crop - expected).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("name", two_processes.NAMES)
def test_steps_replayed_as_graphs_equal_compiled_ones(hearts, name, amp, capsys):
    """Losses and weights of eight steps on different batches, enough to warm up, capture and replay."""
    loader, results = batches(hearts, GPU), []
    for graph in (False, True):
        torch._dynamo.reset()
        settings = loop.settings(**SETTINGS, amp=amp, compile=True, graph=graph)
        step = Step(two_processes.make_method(name), loader, settings)
        stream = loader.epochs(0, 100)
        losses = torch.stack([step(next(stream), 0, number)["loss"] for number in range(8)])
        stream.close()
        results.append((losses.cpu(), [p.detach().cpu() for p in step.method.parameters()]))
    (plain, weights), (replayed, others) = results
    assert (plain - replayed).abs().max() < 1e-2 * plain.abs().max()
    for one, other in zip(weights, others, strict=True):
        assert (one - other).norm() <= 1e-2 * one.norm() + 1e-4
    assert "run without" not in capsys.readouterr().out  # everything was captured


@pytest.mark.slow
@pytest.mark.parametrize("name", two_processes.NAMES)
def test_compiled_networks_give_the_same_loss_and_gradients(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = two_processes.make_method(name).to(GPU, memory_format=torch.channels_last)
    compiled = copy.deepcopy(plain)
    compiled.compile_networks()
    views = {key: value.to(GPU) for key, value in two_processes.global_views(name).items()}
    one, other = (two_processes.loss_and_gradients(m, m, views) for m in (plain, compiled))
    assert one["loss"].item() == pytest.approx(other["loss"].item(), rel=1e-3)
    for key, gradient in one["gradients"].items():
        assert (gradient - other["gradients"][key]).norm() <= KINK * gradient.norm() + 1e-5, key


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs here")
def test_two_gpus_do_what_one_does(tmp_path, monkeypatch):
    """Losses and gradients of the global batch, whose statistics the batch norms of both have in common."""
    torchrun(two_processes.__file__, "gpus", tmp_path, cwd=tmp_path)
    ranks = [torch.load(tmp_path / f"gpus-{rank}.pt", weights_only=True) for rank in (0, 1)]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name in two_processes.NAMES:
        method = two_processes.make_method(name).to(GPU)
        views = {key: value.to(GPU) for key, value in two_processes.global_views(name).items()}
        one = two_processes.loss_and_gradients(method, method, views)
        mean = sum(rank[name]["loss"].item() for rank in ranks) / 2
        assert mean == pytest.approx(one["loss"].item(), rel=1e-4), name
        for key, gradient in one["gradients"].items():
            for rank in ranks:
                difference = rank[name]["gradients"][key] - gradient.cpu()
                assert difference.norm() <= KINK * gradient.norm().cpu() + 1e-5, (name, key)


@pytest.mark.parametrize("method", ["simclr", "pcl", "dino", "mim", "motion", None])
def test_a_deterministic_run_goes_on_to_the_same_bits(phantom_folder, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    script, words = (train_ssp, ["--method", method]) if method else (finetune, [])
    words += ["--data", str(phantom_folder), "--cache", str(tmp_path / "cache"), "--deterministic"]
    words += ["--channels", "8", "16", "16", "--image-size", "64", "--spacing", "3", "--batch-size", "4"]
    words += ["--epochs", "2"]
    words += ["--patch-size", "16"] if method == "mim" else []
    assert script.main([*words, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(script, "Batches", partial(Interrupting, at=(0, 2)))
        with pytest.raises(Stopped):
            script.main([*words, "--out", "broken"])
    assert script.main(["--resume", "broken"]) == 0
    assert_same(tmp_path / "whole", tmp_path / "broken")
    weights = torch.load(tmp_path / "whole" / "unet.pt", weights_only=True)["state_dict"]
    assert {value.device.type for value in weights.values()} == {"cpu"}  # loads on a machine without a GPU
