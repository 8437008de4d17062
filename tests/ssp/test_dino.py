import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from loop import settings

from cmrssp import augmentation
from cmrssp.augmentation import sampling_grid
from cmrssp.losses import dino_cross_entropy
from cmrssp.runs.settings import learning_rate
from cmrssp.ssp.dino import DINO

FLAGS = dict(
    norm="batch",
    image_size=32,
    spacing_mm=1.5,
    augment=True,
    epochs=100,
    local_size=16,
    local_crops=2,
    outputs=12,
    hidden=16,
    student_temperature=0.1,
    teacher_temperature=0.04,
    teacher_temperature_start=0.02,
    teacher_temperature_epochs=30,
    centre_momentum=0.9,
    teacher_momentum=0.996,
    freeze_last_epochs=1,
    export="student",
)


def dino(**changes):
    torch.manual_seed(0)
    return DINO(**{"channels": (4, 8), **FLAGS, **changes})


def views(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        "global": torch.randn(2 * count, 1, 32, 32, generator=generator),
        "local": torch.randn(2 * count, 1, 16, 16, generator=generator),
    }


def slow_loss(student, teacher, centre, ts, tt):
    """Views, slices and prototypes one at a time, in float64."""
    total, pairs = 0.0, 0
    for i, t in enumerate(teacher):
        for j, s in enumerate(student):
            if i == j:
                continue
            for row_t, row_s in zip(t.double().numpy(), s.double().numpy(), strict=True):
                sharp = np.exp((row_t - centre.double().numpy()) / tt)
                soft = np.exp(row_s / ts)
                total -= sum(
                    p * math.log(q) for p, q in zip(sharp / sharp.sum(), soft / soft.sum(), strict=True)
                )
                pairs += 1
    return total / pairs


def test_loss_equals_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    student = [torch.rand(3, 7, generator=generator) for _ in range(4)]
    teacher = [torch.rand(3, 7, generator=generator) for _ in range(2)]
    centre = torch.rand(7, generator=generator)
    ours = dino_cross_entropy(student, teacher, centre, (0.1, 0.04)).item()
    assert ours == pytest.approx(slow_loss(student, teacher, centre, 0.1, 0.04), abs=1e-5)


def test_three_steps_of_loss_centre_and_teacher_equal_a_slow_loop():
    method = dino()
    optimizer = torch.optim.SGD(method.param_groups(0.0), lr=0.1)
    centre = torch.zeros(12, dtype=torch.float64)
    teachers = {
        n: p.detach().double().clone() for n, p in method.named_parameters() if n.startswith("teacher")
    }
    for step in range(3):
        now, seen = 5 + step / 3, views(step)
        with torch.no_grad():  # batch norm in training mode depends on the batch alone
            teacher = method.teacher_head(method.teacher_encoder.pooled(seen["global"]))
            pooled = torch.cat([method.encoder.pooled(seen["global"]), method.encoder.pooled(seen["local"])])
            student = method.head(pooled)
        temperature = 0.02 + 0.02 * now / 30
        expected = slow_loss(student.split(3), teacher.split(3), centre, 0.1, temperature)
        loss, _ = method(seen, now)
        assert loss.item() == pytest.approx(expected, abs=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.on_step_end(now)
        momentum = 1 - 0.004 * (math.cos(math.pi * now / 100) + 1) / 2
        centre = 0.9 * centre + 0.1 * teacher.double().mean(dim=0)
        assert (method.centre - centre).abs().max() < 1e-6
        for name, value in teachers.items():
            source = dict(method.named_parameters())[name.removeprefix("teacher_")].detach().double()
            teachers[name] = momentum * value + (1 - momentum) * source
            assert (dict(method.named_parameters())[name] - teachers[name]).abs().max() < 1e-6


def test_the_teacher_starts_as_a_copy_without_gradient():
    method = dino()
    for name, p in method.named_parameters():
        if name.startswith("teacher_"):
            assert (
                torch.equal(p, dict(method.named_parameters())[name.removeprefix("teacher_")])
                and not p.requires_grad
            )
    loss, _ = method(views(0), 0.0)
    loss.backward()
    assert all((p.grad is None) == n.startswith("teacher_") for n, p in method.named_parameters())


def test_the_last_layer_is_frozen_in_epoch_0():
    method = dino()
    for epoch, frozen in ((0.0, True), (0.99, True), (1.0, False)):
        method(views(0), epoch)[0].backward()
        method.on_backward_end(epoch)
        assert (method.head.last.grad is None) == frozen and method.encoder.stages[
            0
        ].conv1.weight.grad is not None
        method.zero_grad()


def test_validation_leaves_the_centre_alone():
    method = dino().eval()
    method(views(0), 0.0)
    assert not method.batch_centre.any()


def test_schedules_by_hand():
    method = dino()
    assert [method.teacher_temperature(e) for e in (0, 1, 30, 50, 100)] == pytest.approx(
        [0.02, 0.02 + 0.02 / 30, 0.04, 0.04, 0.04]
    )
    assert [method.teacher_momentum(e) for e in (0, 1, 10, 50, 100)] == pytest.approx(
        [
            0.996,
            1 - 0.002 * (1 + math.cos(0.01 * math.pi)),
            1 - 0.002 * (1 + math.cos(0.1 * math.pi)),
            0.998,
            1.0,
        ]
    )
    schedule = {k: DINO.defaults[k] for k in ("lr", "warmup_epochs", "final_lr")}
    paper = settings(epochs=100, schedule="cosine", **schedule)
    assert [learning_rate(paper, e) for e in (0, 1, 10, 55, 100)] == pytest.approx(
        [0, 0.00075, 0.0075, (0.0075 + 1e-6) / 2, 1e-6]
    )
    assert dino(epochs=10).teacher_temperature(10) == pytest.approx(
        0.04
    )  # a warm-up longer than the run ends with it


def test_no_weight_decay_on_biases_and_norms():
    method = dino()
    decayed, free = method.param_groups(0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in method.named_parameters()}
    stages = [f"encoder.stages.{s}.{layer}{i}" for s in (0, 1) for layer in ("conv", "norm") for i in (1, 2)]
    weights = {f"{name}.weight" for name in stages if "conv" in name}
    weights |= {"head.last", *(f"head.layers.{i}.weight" for i in (0, 3, 6))}
    biases = {f"{name}.bias" for name in stages} | {f"{name}.weight" for name in stages if "norm" in name}
    biases |= {f"head.layers.{i}.bias" for i in (0, 1, 3, 4, 6)} | {f"head.layers.{i}.weight" for i in (1, 4)}
    assert {names[id(p)] for p in decayed["params"]} == weights
    assert {names[id(p)] for p in free["params"]} == biases


def test_crops_have_the_papers_fields_of_view():
    """On the native grid: global 14-100 % of (448 mm)^2, local 100-168 mm wide, centres within 80 mm."""
    method = DINO(**{"channels": (4, 8), **FLAGS, "image_size": 256, "local_size": 128, "spacing_mm": 1.25})
    count = 400
    batch = {
        "image": torch.zeros(count, 1, 64, 64),
        "spacing_mm": torch.ones(count, 2),
        "centre": torch.zeros(count, 2),
    }
    for ranges, size, low, high in zip(
        method.crop_ranges(), (256, 256, 128), (167, 167, 100), (448, 448, 168), strict=True
    ):
        draws = augmentation.draw(count, ranges, torch.Generator().manual_seed(0))
        grid = sampling_grid(batch, draws, image_size=size, spacing_mm=1.25)
        at = (grid + 1) / 2 * 63  # mm, (x, y): spacing 1, centre 0
        side = (at[:, 0, -1] - at[:, 0, 0]).norm(dim=1) * size / (size - 1)
        assert side.min() > low - 1 and side.max() < high + 1
        assert side.min() < low + 0.05 * (high - low) and side.max() > high - 0.05 * (high - low)
        if size == 128:
            middle = (at[:, 0, 0] + at[:, -1, -1]) / 2
            offset = (draws.translation_mm * draws.fov_factor[:, None]).abs()
            assert middle.norm(dim=1).max() < 80 * 2**0.5 + 0.1 and 76 < offset.max() <= 80.001


def test_intensities_of_the_three_kinds_of_views():
    first, second, local = (
        augmentation.draw(4000, r, torch.Generator().manual_seed(0)) for r in dino().crop_ranges()
    )
    share = {"noise_std": 0.15, "brightness": 0.2, "shift": 0.15, "gamma": 0.15}
    for draws in (first, second, local):
        for name, p in share.items():
            neutral = 1.0 if name in ("brightness", "gamma") else 0.0
            assert (getattr(draws, name) != neutral).float().mean().item() == pytest.approx(p, abs=0.03)
    assert first.blur_sigma_px.min() >= 0.1 and first.blur_sigma_px.max() <= 2.0
    for draws, blurred, solarised in ((second, 0.1, 0.2), (local, 0.1, 0.0)):
        assert (draws.blur_sigma_px[:, 0] > 0).float().mean().item() == pytest.approx(blurred, abs=0.02)
        assert draws.solarise.float().mean().item() == pytest.approx(solarised, abs=0.03)


def test_crops_of_one_pass_equal_those_made_one_by_one():
    """To the bit, with noise in every crop and blurs of several radii."""
    method, count = dino(local_crops=4), 6
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randint(0, 900, (count, 1, 64, 64), generator=generator).to(torch.int16),
        "spacing_mm": torch.ones(count, 2),
        "centre": torch.full((count, 2), 30.0),
        "mean": torch.full((count,), 450.0),
        "std": torch.full((count,), 260.0),
        "max": torch.full((count,), 900.0),
    }
    first, second, local = (replace(ranges, p_noise=0.7, p_blur=0.5) for ranges in method.crop_ranges())
    method.crop_ranges = lambda: (first, second, local)
    found = method.views(batch, torch.Generator().manual_seed(3))
    one_by_one = torch.Generator().manual_seed(3)
    for crop, ranges in zip(
        (*found["global"].chunk(2), *found["local"].chunk(4)), (first, second, *[local] * 4), strict=True
    ):
        size = {"image_size": crop.shape[-1], "spacing_mm": 1.5}
        assert torch.equal(crop, augmentation.augment(batch, [ranges], one_by_one, **size)["image"])


def test_export_decides_whose_encoder_transfers():
    for export, prefix in (("student", "encoder."), ("teacher", "teacher_encoder.")):
        method = dino(export=export)
        with torch.no_grad():
            method.encoder.stages[0].conv1.weight += 1
        state = method.state_dict()
        exported = method.pretrained_state()
        assert all(torch.equal(v, state[prefix + k.removeprefix("encoder.")]) for k, v in exported.items())
        assert {k.split(".")[0] for k in exported} == {"encoder"}


def test_bf16_stays_near_float32():
    method = dino()
    plain = method(views(0), 10.0)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(views(0), 10.0)[0]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain, abs=2e-2)


def test_an_output_that_overflows_leaves_the_centre_finite():
    method = dino()
    with torch.no_grad():
        method.teacher_head.layers[6].bias[0] = float("nan")
    method(views(0), 10.0)
    method.on_step_end(10.0)
    assert method.centre.isfinite().all()
