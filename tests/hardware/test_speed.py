"""The fast ways give what the plain ones give, and the benchmark counts right."""

import contextlib
import copy
import re

import loop
import numpy as np
import pytest
import torch
import two_processes
from test_device import compiles
from torch import nn

import finetune
import train_ssp
from cmrssp import augmentation
from cmrssp.cli import flags
from cmrssp.data import dataset, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.errors import UserError
from cmrssp.hardware import benchmark, memory
from cmrssp.hardware.__main__ import main
from cmrssp.ssp import METHODS
from cmrssp.training import Step, step_generator
from cmrssp.unet import UNet, recompute_activations

CPU = torch.device("cpu")
TINY = ["--channels", "4", "8", "8", "--image-size", "32", "--spacing", "6", "--batch-size", "4"]


@pytest.fixture
def hearts(write_mnms, beating, tmp_path):
    """Two subjects of unlike sizes, 32 x 40 and 65 x 70 pixels (rows x columns)."""
    write_mnms("A", *beating(0))
    cine, labels = beating(1)
    pads = ((20, 10), (13, 20), (0, 0), (0, 0))
    folder = write_mnms("B", np.pad(cine, pads), np.pad(labels, pads))
    return store.build(dataset.find([folder], tmp_path)[0], tmp_path / "cache", labels=True)


def batches(cines, *, labelled=True, batch_size=5, motion=False):
    slices = Slices(cines, sorted(cines.index), phases="both" if labelled else None)
    return Batches(cines, slices, batch_size=batch_size, seed=2, labelled=labelled, motion=motion, device=CPU)


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[k].nan_to_num(-9), other[k].nan_to_num(-9)) and one[k].dtype == other[k].dtype
        for k in one
    )


@pytest.mark.parametrize(("labelled", "motion"), [(True, False), (False, False), (False, True)])
def test_slices_on_the_device_are_those_of_the_files(hearts, labelled, motion):
    read, kept = (batches(hearts, labelled=labelled, motion=motion) for _ in range(2))
    kept.keep_on_device()
    expected = [*read.epochs(0, 2), *read.in_order(), *read.in_order(3)]
    shapes = {tuple(b["image"].shape[2:]) for b in expected}
    assert shapes == {(64, 64), (128, 128)} and len(expected) == 2 * len(read) + -(-len(read.slices) // 5) + 1
    for cine in (*hearts.cines, *(hearts.labels if labelled else ())):
        cine.path.unlink()  # from here on there is nothing left to read
    found = [*kept.epochs(0, 2), *kept.in_order(), *kept.in_order(3)]
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_epochs_follow_one_another(hearts):
    loader = batches(hearts, labelled=False)
    apart = [list(loader.epochs(epoch, epoch + 1)) for epoch in range(3)]
    together = list(loader.epochs(0, 3, 2))
    assert len(loader) == 3 and len(together) == 7
    assert all(same(a, b) for a, b in zip([b for epoch in apart for b in epoch][2:], together, strict=True))
    assert not same(apart[0][0], apart[1][0])


def test_what_the_device_has_no_room_for_is_read_or_refused(hearts, monkeypatch, capsys):
    """18 slices, half of them 32 x 40 and half 65 x 70 pixels, of 2 bytes: 104,940 bytes."""
    method = two_processes.make_method("mim")
    loader = batches(hearts, labelled=False)
    needed = 9 * (32 * 40 + 65 * 70) * 2
    memory.check(method, loader, loop.settings(), "auto")
    assert loader.on_device is None and "device cache" not in capsys.readouterr().out  # on a CPU
    fixed, per_slice = memory.estimate(method, loader, amp="off")
    for factor, compiled in ((1.3, False), (2.1, True)):
        room, settings = factor * (fixed + 5 * per_slice) + 2e9, loop.settings(compile=compiled)
        monkeypatch.setattr(memory, "free", lambda device, room=room: room + needed - 1)
        with pytest.raises(UserError, match=r"--device-cache on: slices take 0\.0 GB, .* are free besides"):
            memory.check(method, loader, settings, "on")
        monkeypatch.setattr(memory, "free", lambda device, room=room: room + needed + 1)
        memory.check(method, loader, settings, "on")
    assert (
        loader.on_device.pixels["image"].numel() * 2 == needed
        and "device cache: on" in capsys.readouterr().out
    )


def test_where_slices_lie_and_what_is_recomputed_change_no_bit(phantom_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = {}
    for flag in ("--device-cache=off", "--device-cache=on", "--grad-checkpoint"):
        words = ["--method", "mim", "--data", str(phantom_folder), "--cache", str(tmp_path / "cache"), *TINY]
        words += ["--patch-size", "8", "--epochs", "1", "--device", "cpu", "--out", flag.strip("-"), flag]
        assert train_ssp.main(words) == 0
        made[flag] = (tmp_path / flag.strip("-") / "unet.pt").read_bytes()
    assert len(set(made.values())) == 1
    again = ["--resume", "grad-checkpoint"]
    assert train_ssp.parse(again)[0].grad_checkpoint
    assert not train_ssp.parse([*again, "--no-grad-checkpoint"])[0].grad_checkpoint


@pytest.mark.parametrize("name", two_processes.NAMES)
def test_a_step_reads_nothing_back_from_the_device(hearts, name, monkeypatch):
    """A tensor on torch's meta device holds no number: to read one is an error, and so is most arithmetic
    between two devices. The patches are for what torch does not have there.
    """

    class Generator(torch.Generator):
        def __new__(cls, device=None):
            return super().__new__(cls)

    randn = torch.randn
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "randn", lambda *shape, generator, **options: randn(*shape, **options))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    loader = batches(hearts, motion=True)
    batch = {key: value.to("meta") for key, value in next(loader.in_order()).items()}
    loader.device = torch.device("meta")
    settings = loop.settings(**two_processes.SETTINGS)
    step = Step(two_processes.make_method(name), loader, settings)
    for group in step.optimizer.param_groups:
        group["fused"] = False
    for number in range(4):  # which of the images get noise or blur differs
        found = step(batch, 0, number)
        assert {value.device.type for value in found.values()} == {"meta"}
    with pytest.raises(RuntimeError, match="meta"):
        found["loss"].item()


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_recomputed_activations_give_the_same_bits(norm, frozen, half):
    torch.manual_seed(0)
    plain = UNet(channels=(4, 8, 8), num_outputs=2, num_heads=2, norm=norm)
    again = copy.deepcopy(plain)
    recompute_activations(again)
    image, losses = torch.randn(3, 1, 16, 16), []
    for network in (plain, again):
        network.encoder.train(not frozen)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = sum(output.float().square().mean() for output in network(image))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), again.buffers(), strict=True))


def test_recomputing_keeps_the_inputs_of_the_convolutions_alone(hearts):
    """By hand for stages of 4, 8 and 8 channels at 32, 16 and 8 px, two views of a slice, each given and kept
    by the first convolution. Four maps of a stage are kept (what each convolution gives, and what norm and
    activation make of it), or two, and one of the last.
    """
    method, loader = two_processes.make_method("simclr"), batches(hearts, labelled=False)
    maps = [4 * 32 * 32, 8 * 16 * 16, 8 * 8 * 8]
    given = 2 * (2 * 4 * 32 * 32)
    kept = memory.estimate(method, loader, amp="off")[1]
    assert kept - given == pytest.approx(2 * 4 * 4 * sum(maps), rel=0.02)
    recompute_activations(method)
    fewer = memory.estimate(method, loader, amp="off")[1]
    assert fewer - given == pytest.approx(2 * 4 * (2 * sum(maps) - maps[2]), rel=0.02)


def test_fp16_leaves_out_a_first_step_and_begins_from_zero_momentum(hearts):
    """The second step is the first one that counts: p - lr (g + momentum g) of Nesterov, without decay."""
    settings = loop.settings(epochs=2, weight_decay=0.0, amp="fp16")
    method = two_processes.make_method("segmentation")
    loader = batches(hearts)
    step, batch = Step(method, loader, settings), next(loader.in_order())
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    first = step(batch, 0, 0)
    assert not first["gradient_norm"].isfinite() and step.scaler.get_scale() == 2.0**59
    assert all(torch.equal(p, before[name]) for name, p in method.named_parameters())
    step.scaler.update(8.0)
    plain = copy.deepcopy(method)
    with step.autocast():
        loss, _ = plain(plain.views(batch, step_generator(4, 0, 0)), 0.0)
    (loss * 8).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]) / 8
    assert step(batch, 0, 0)["gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    for (name, p), twin in zip(method.named_parameters(), plain.parameters(), strict=True):
        assert (p - (before[name] - 0.05 * 1.9 * twin.grad / 8)).abs().max() < 1e-6, name


def test_a_training_without_fp16_goes_on_with_it(hearts):
    """Its momentum is taken; the scaler begins anew."""
    settings = loop.settings(epochs=2, amp="fp16")
    first, second = (
        Step(two_processes.make_method("segmentation"), batches(hearts), settings) for _ in range(2)
    )
    momentum = {p: state["momentum_buffer"] for p, state in first.optimizer.state.items()}
    assert all(buffer.fill_(0.25).any() for buffer in momentum.values())
    second.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    second.load_state_dict({"optimizer": first.optimizer.state_dict(), "scaler": {}})
    assert second.scaler.get_scale() == 8.0
    assert all((state["momentum_buffer"] == 0.25).all() for state in second.optimizer.state.values())


def test_intensity_in_place_equals_the_plain_order():
    """Noise apart: blur, brightness, shift, gamma on the image rescaled to its own range, one by one, in
    float64.
    """
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(6, 1, 24, 20, generator=generator)
    ranges = augmentation.Ranges(p_noise=0.0, p_blur=0.5, p_solarise=0.5)
    draws = augmentation.draw(6, ranges, generator)
    found = augmentation.intensity_(image.clone(), draws, torch.full((6,), 3.0))
    assert 0 < (draws.blur_sigma_px[:, 0] > 0).sum() < 6 and 0 < draws.solarise.sum() < 6
    for i in range(6):
        x = image[i : i + 1].double()
        if draws.blur_sigma_px[i, 0] > 0:
            radius = int(4 * float(draws.blur_sigma_px.max()) + 0.5)
            x = augmentation.gaussian_blur(x.float(), draws.blur_sigma_px[i : i + 1], radius).double()
        x = x * draws.brightness[i].double() + draws.shift[i].double()
        low, high = x.min(), x.max()
        x = ((x - low) / (high - low)) ** draws.gamma[i].double() * (high - low) + low
        x = torch.where(x > 0, 3.0 - x, x) if draws.solarise[i] else x
        assert (found[i] - x[0]).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segmentation", "motion", "mim", "simclr", "dino"])
def test_compiled_networks_give_the_same_loss_and_gradients(name, tmp_path):
    """Whole U-Nets and their losses; an encoder; one with a teacher beside it. No key is renamed."""
    if not compiles("on", CPU):
        pytest.skip("there is no C++ compiler for torch.compile")
    plain = two_processes.make_method(name)
    compiled = copy.deepcopy(plain)
    compiled.compile_networks()
    views = two_processes.global_views(name)
    one, other = (two_processes.loss_and_gradients(m, m, views) for m in (plain, compiled))
    assert one["loss"].item() == pytest.approx(other["loss"].item(), abs=1e-5)
    for name, gradient in one["gradients"].items():
        assert (gradient - other["gradients"][name]).abs().max() < 1e-5, name
    assert plain.state_dict().keys() == compiled.state_dict().keys()


@pytest.mark.slow
def test_a_step_meant_for_a_graph_falls_back_where_there_is_none(hearts, monkeypatch, tmp_path, capsys):
    """On a CPU torch makes no graph: the losses are those of eager steps, and one notice is printed."""
    if not compiles("on", CPU):
        pytest.skip("there is no C++ compiler for torch.compile")
    losses = []
    for fast in (False, True):
        settings = loop.settings(**two_processes.SETTINGS, compile=fast, graph=fast)
        step = Step(two_processes.make_method("segmentation"), batches(hearts), settings)
        batch = next(batches(hearts).in_order())
        losses.append([step(batch, 0, number)["loss"].item() for number in range(6)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert capsys.readouterr().out.count("graph: ") == 1


def test_the_flags_decide_what_is_compiled(hearts, capsys):
    """On a CPU nothing is by itself; a network with --grad-checkpoint never is."""
    loader = batches(hearts)
    for words in ([], ["--compile", "off"], ["--grad-checkpoint", "--compile", "on"]):
        args = train_ssp.parse(["--method", "mim", *words])[0]
        decided = flags.settings(args, loader)
        assert (decided.compile, decided.graph) == (False, False)
        assert ("compile: off" in capsys.readouterr().out) == ("on" in words)
    assert train_ssp.parse(["--method", "mim", "--compile"])[0].compile == "on"


def test_work_is_counted_as_by_hand():
    a, b, c = torch.ones(3, 5), torch.ones(5, 7), torch.ones(3, 5)
    assert benchmark.work(lambda: a @ b) == (2 * 3 * 5 * 7, 4 * (3 * 5 + 5 * 7 + 3 * 7))
    assert benchmark.work(lambda: a.add_(1.0)) == (0, 4 * 2 * 15)  # read and written
    assert benchmark.work(lambda: a.copy_(c)) == (0, 4 * 2 * 15)  # one read, the other written
    assert benchmark.work(lambda: torch.add(a, c, out=c)) == (0, 4 * 3 * 15)
    assert benchmark.work(lambda: a.zero_()) == (0, 4 * 15)
    assert benchmark.work(lambda: a.t().reshape(5, 3)[1:]) == (0, 0)  # views
    optimizer = torch.optim.SGD([p := torch.ones(9, requires_grad=True)], 0.1, momentum=0.9, fused=True)
    optimizer.state[p]["momentum_buffer"], p.grad = torch.zeros(9), torch.ones(9)
    assert benchmark.work(optimizer.step) == (0, 4 * 6 * 9)  # parameter, gradient, momentum: in and out
    image, conv = torch.ones(2, 3, 8, 8, requires_grad=True), nn.Conv2d(3, 4, 3, padding=1, bias=False)
    forward = 2 * 2 * 4 * 8 * 8 * 3 * 9
    assert benchmark.work(lambda: conv(image))[0] == forward
    assert benchmark.work(lambda: conv(image).sum().backward())[0] == 3 * forward


def measurement(**rates: list[float]) -> benchmark.Measurement:
    """A slice takes 6 FLOP of 2 FLOP/s and 8 bytes of 4 byte/s."""
    rates = {name.replace("_", " "): each for name, each in rates.items()}
    work = {"flops": 6.0, "moved": 8.0, "peak": 2.0, "bandwidth": 4.0}
    return benchmark.Measurement(rates, steps_per_round=1, waiting=0.0, peak_memory=0, **work)


def test_ratios_of_rates_are_taken_round_by_round():
    found = measurement(a=[9.0, 50.0, 40.0], b=[10.0, 100.0, 50.0])
    assert found.ratio("a", "b") == "a / b: 0.800 (0.500 to 0.900)" and found.rate("a") == 40.0


def test_the_floor_is_the_larger_of_arithmetic_and_traffic():
    """The arithmetic takes 3 s, the traffic 2 s, the step 6 s."""
    found = measurement(step_alone=[1 / 6])
    assert found.floor == 3.0 and found.times_floor == pytest.approx(2.0)


def test_the_table_of_all_objectives(phantom_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(phantom_folder), "--cache", str(tmp_path / "cache"), "--quick", "--device", "cpu"]
    words += ["--channels", "4", "8", "--image-size", "32", "--batch-size", "4", "--benchmark", "1"]
    assert main(words) == 0
    names = [*METHODS, "segmentation"]
    lines = capsys.readouterr().out.splitlines()[-len(names) :]
    assert [line.split()[:3] for line in lines] == [[name, "4", "off"] for name in names]
    for line in lines:
        assert all(float(figure) > 0 for figure in line.split()[3:9])


def test_the_table_leaves_out_what_its_data_cannot_train(write_mnms, beating, tmp_path, monkeypatch, capsys):
    """A cine of one frame without labels."""
    monkeypatch.chdir(tmp_path)
    folder = write_mnms("A", beating()[0][..., :1])
    words = ["--data", str(folder), "--cache", str(tmp_path / "cache"), "--quick", "--device", "cpu"]
    words += ["--channels", "4", "8", "--image-size", "32", "--batch-size", "4", "--benchmark", "1"]
    assert main(words) == 0
    names = sorted(METHODS.keys() - {"motion"})
    assert sorted(line.split()[0] for line in capsys.readouterr().out.splitlines()[-len(names) :]) == names


def test_the_benchmark_of_both_scripts(phantom_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--data", str(phantom_folder), "--cache", str(tmp_path / "cache"), *TINY, "--device", "cpu"]
    runs = {"simclr": (train_ssp, ["--method", "simclr"]), "segmentation": (finetune, [])}
    for name, (script, words) in runs.items():
        # in all more steps than the training has
        assert script.main([*words, *common, "--epochs", "3", "--benchmark", "14"]) == 0
        out = capsys.readouterr().out
        rates = {title: float(rate) for title, rate in re.findall(r"^(\w+ \w+) +([\d.e+]+)   ", out, re.M)}
        assert rates.keys() == {"real path", "step alone", "augmentation alone", "network alone"}
        assert min(rates.values()) > 0
        assert f"benchmark: {name}, batches of 4 slices at 32 px, channels 4 8 8, mixed precision off" in out
        for line in (
            r"real path / step alone: \d\.\d+ \(.* to .*\); waiting for slices: [\d.]+ % of the time",
            r"step alone / network alone: \d\.\d+ ",
            r"peak memory: \d",
            r"a slice: .* GFLOP, .* GB in and out",
            r"floor: .* slices/s, set by (memory|arithmetic)",
            r"the whole training: 3 epochs x \d+ steps",
        ):
            assert re.search(line, out), (line, out)
    assert not (tmp_path / "runs").exists()
