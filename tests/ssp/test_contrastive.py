import json
import math

import golden_nt_xent
import numpy as np
import pytest
import torch

from cmrssp.data import dataset, store
from cmrssp.losses import nt_xent
from cmrssp.ssp.pcl import PCL
from cmrssp.ssp.simclr import SimCLR

SMALL = {
    "channels": (4, 8),
    "norm": "batch",
    "image_size": 16,
    "spacing_mm": 1.5,
    "augment": True,
    "temperature": 0.1,
    "projection": 8,
}


def slow_nt_xent(embeddings, positives, temperature):
    """Two loops in float64."""
    z = embeddings.detach().double().numpy()
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    losses = []
    for i in range(len(z)):
        below = sum(math.exp(z[i] @ z[k] / temperature) for k in range(len(z)) if k != i)
        terms = [
            -math.log(math.exp(z[i] @ z[j] / temperature) / below) for j in range(len(z)) if positives[i, j]
        ]
        losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses)


def sample(seed=0, count=10):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, 6, generator=generator)
    group = torch.arange(count // 2).repeat(2) // 2
    return embeddings, (group[:, None] == group[None]).fill_diagonal_(False)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_a_slow_loop(temperature):
    embeddings, positives = sample()
    assert positives.sum(dim=1).min() < positives.sum(dim=1).max()
    ours = nt_xent(embeddings, positives, temperature).item()
    assert ours == pytest.approx(slow_nt_xent(embeddings, positives, temperature), abs=1e-6)


def test_nt_xent_gradient_equals_differences():
    embeddings, positives = sample(1)
    embeddings.requires_grad_()
    nt_xent(embeddings, positives, 0.5).backward()
    slow = torch.zeros_like(embeddings, dtype=torch.float64)
    for place in np.ndindex(*embeddings.shape):
        step = torch.zeros_like(slow)
        step[place] = 1e-6
        around = [slow_nt_xent(embeddings.double() + sign * step, positives, 0.5) for sign in (1, -1)]
        slow[place] = (around[0] - around[1]) / 2e-6
    assert (embeddings.grad - slow).abs().max() < 1e-6


def test_nt_xent_equals_another_library():
    golden = json.loads(golden_nt_xent.GOLDEN.read_text())
    embeddings = golden_nt_xent.embeddings()
    group = torch.tensor(golden_nt_xent.GROUPS)
    many = (group[:, None] == group[None]).fill_diagonal_(False)
    one = torch.eye(12, dtype=torch.bool).roll(6, dims=1)
    for temperature, losses in golden.items():
        assert nt_xent(embeddings, one, float(temperature)).item() == pytest.approx(
            losses["one positive"], abs=1e-5
        )
        assert nt_xent(embeddings, many, float(temperature)).item() == pytest.approx(
            losses["many positives"], abs=1e-5
        )


def test_nt_xent_knows_no_order_and_no_first_view():
    embeddings, positives = sample()
    loss = nt_xent(embeddings, positives, 0.1)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert nt_xent(embeddings[order], positives[order][:, order], 0.1).item() == pytest.approx(
        loss.item(), rel=1e-6
    )
    swapped = torch.cat([embeddings[5:], embeddings[:5]])
    one = torch.eye(10, dtype=torch.bool).roll(5, dims=1)
    assert nt_xent(swapped, one, 0.1).item() == pytest.approx(nt_xent(embeddings, one, 0.1).item(), rel=1e-6)


def test_nt_xent_is_float32_under_autocast():
    embeddings, positives = sample()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(embeddings, positives, 0.1)
    assert loss.dtype == torch.float32 and loss.item() == nt_xent(embeddings, positives, 0.1).item()


@pytest.mark.parametrize("method", [SimCLR(**SMALL), PCL(**SMALL, threshold=0.1)])
def test_bf16_stays_near_float32(method):
    views = {"image": torch.randn(8, 1, 16, 16), "position": torch.arange(4).repeat(2) / 4}
    plain = method(views, 0.0)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(views, 0.0)[0]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain, abs=2e-2)


def test_simclr_attracts_the_other_view_alone():
    positives = SimCLR(**SMALL).positives(torch.zeros(6))
    assert positives.int().tolist() == [[int(j == (i + 3) % 6) for j in range(6)] for i in range(6)]


def test_pcl_attracts_near_positions_of_any_subject():
    """Slice 3 of 10 and slice 2 of 10 differ by exactly the threshold: not below it, however floats round."""
    position = torch.tensor([0.3, 0.2, 0.25, float("nan"), 1 / 3, 0.9]).repeat(2)
    method = PCL(**SMALL, threshold=0.1)
    positives = method.positives(position)
    near = {0: {2, 4}, 1: {2}, 2: {0, 1, 4}, 3: set(), 4: {0, 2}, 5: set()}
    for i in range(12):
        expected = {(i + 6) % 12} | {j for k in near[i % 6] for j in (k, k + 6)}
        assert set(positives[i].nonzero()[:, 0].tolist()) == expected, i
    for n in range(2, 21):
        for k in range(n):
            for m in range(2, 21):
                other = (k * m * 10 - n * m) / (10 * n)  # k / n - other / m is 0.1
                if other >= 0 and abs(other - round(other)) < 1e-9:
                    pair = torch.tensor([k / n, round(other) / m]).repeat(2)
                    found = method.positives(pair)
                    assert found.int().sum() == 4


def test_position_0_is_the_base_in_real_patients(acdc70, tmp_path):
    """Mean labelled LV area of the first third of the stack against the last third."""
    cines = store.build(dataset.find([acdc70], tmp_path)[0], tmp_path, labels=True)
    right = 0
    for i, record in enumerate(cines.labels):
        areas = (cines.label_volume(i, record.ed) == 1).sum(axis=(1, 2))
        third = max(1, len(areas) // 3)
        right += areas[:third].mean() > areas[-third:].mean()
    assert len(cines.subjects) == 70 and right >= 69
