import numpy as np
import pytest
import torch

from cmrssp.data import dataset, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.ssp import health
from cmrssp.ssp.health import effective_rank, position_probe
from cmrssp.ssp.mim import MIM
from cmrssp.training import step_generator


def test_effective_rank_by_hand():
    assert effective_rank(torch.eye(6)) == pytest.approx(6.0)
    assert effective_rank(torch.ones(50, 8)) == pytest.approx(1.0)
    # singular values 3 and 1: shares 3/4 and 1/4
    assert effective_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])) == pytest.approx(
        np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    )


def test_position_probe_equals_scipys_least_squares():
    rng = np.random.default_rng(0)
    features, subject = rng.normal(size=(90, 4)), np.repeat(np.arange(9), 10)
    position = features @ [0.3, -0.2, 0.0, 0.1] + 0.2 * rng.normal(size=90)
    residual = total = 0.0
    for fit in (np.isin(subject, [0, 2, 4, 6, 8]), np.isin(subject, [1, 3, 5, 7])):
        a = (features - features[fit].mean(0)) / np.sqrt(features[fit].var(0).mean())
        # ridge as ordinary least squares with added rows
        rows = np.vstack([a[fit], np.sqrt(fit.sum()) * np.eye(4)])
        weights = np.linalg.lstsq(
            rows, np.append(position[fit] - position[fit].mean(), np.zeros(4)), rcond=None
        )[0]
        held = position[~fit]
        residual += ((held - position[fit].mean() - a[~fit] @ weights) ** 2).sum()
        total += ((held - held.mean()) ** 2).sum()
    known = torch.from_numpy(np.append(position, np.nan))
    ours = position_probe(
        torch.from_numpy(np.vstack([features, np.ones((1, 4))])),
        known,
        torch.from_numpy(np.append(subject, 9)),
    )
    assert ours == pytest.approx(1 - residual / total, abs=1e-9) and 0.2 < ours < 0.9


def test_position_probe_of_noise_is_not_above_zero():
    generator = torch.Generator().manual_seed(0)
    features, position = torch.randn(200, 20, generator=generator), torch.rand(200, generator=generator)
    assert position_probe(features, position, torch.arange(200) // 10) < 0.05
    assert np.isnan(position_probe(features, position, torch.zeros(200)))


@pytest.mark.parametrize("collapsed", [True, False])
def test_a_collapse_is_said_when_it_happens(phantom_folder, tmp_path, capsys, collapsed):
    cines = store.build(dataset.find([phantom_folder], tmp_path)[0], tmp_path / "cache", labels=False)
    loader = Batches(
        cines,
        Slices(cines, list(cines.index)),
        batch_size=8,
        seed=0,
        labelled=False,
        device=torch.device("cpu"),
    )
    torch.manual_seed(0)
    network = {"channels": (16, 32, 64, 128, 128), "norm": "batch", "image_size": 96, "spacing_mm": 2.25}
    method = MIM(**network, augment=True, patch_size=32, mask_ratio=0.75)
    with torch.no_grad():
        for _ in range(5):  # the batch norms learn the statistics of the features
            for batch in loader.in_order():
                method(method.views(batch, None), 0.0)
    if collapsed:
        with torch.no_grad():
            method.encoder.stages[-1].norm2.weight.zero_()  # every feature is its bias, whatever the image
            method.encoder.stages[-1].norm2.bias.normal_()
    figures = health.check(method, loader, 1)
    method.eval()
    with torch.no_grad():
        losses = [
            method(method.views(batch, step_generator(0, 0, i)), 1.0)[0].item()
            for i, batch in enumerate(loader.in_order()) if len(batch["image"]) == 8
        ]  # fmt: skip
    method.train()
    assert len(losses) < -(-len(loader.slices) // 8)  # the last batch is smaller, and left out
    assert figures["validation_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert set(figures) == {"validation_loss", "effective_rank", "position_r2"} and method.training
    assert (figures["effective_rank"] < 1.01) == collapsed
    assert ("warning: the features collapse" in capsys.readouterr().out) == collapsed, figures
