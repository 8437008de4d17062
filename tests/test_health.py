import numpy as np
import pytest
import torch

from cmrssp.health import effective_rank, position_probe


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
        a = (features - features[fit].mean(0)) / features[fit].std(0)
        # ridge as ordinary least squares with added rows
        rows = np.vstack([a[fit], np.sqrt(0.01 * fit.sum()) * np.eye(4)])
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
    assert ours == pytest.approx(1 - residual / total, abs=1e-9) and 0.3 < ours < 0.9


def test_position_probe_of_noise_is_not_above_zero():
    generator = torch.Generator().manual_seed(0)
    features, position = torch.randn(200, 20, generator=generator), torch.rand(200, generator=generator)
    assert position_probe(features, position, torch.arange(200) // 10) < 0.05
    assert np.isnan(position_probe(features, position, torch.zeros(200)))
