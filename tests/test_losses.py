import math

import numpy as np
import pytest
import torch

from cmrssp.losses import deep_supervision, dice_cross_entropy, masked_mse
from cmrssp.metrics import dice


def test_masked_mse_by_hand():
    prediction = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    target = torch.tensor([[[[0.0, 5.0], [3.0, 2.0]]]])
    mask = torch.tensor([[[[True, False], [True, True]]]])
    assert masked_mse(prediction, target, mask).item() == pytest.approx((1 + 0 + 4) / 3)


def slow_dice_cross_entropy(logits, labels):
    """One slice, class and pixel at a time, in float64."""
    b, c, h, w = logits.shape
    entropy, scores = [], []
    for i in range(b):
        probability = np.zeros((c, h, w))
        for y in range(h):
            for x in range(w):
                e = [math.exp(float(v)) for v in logits[i, :, y, x]]
                probability[:, y, x] = [v / sum(e) for v in e]
                entropy.append(-math.log(probability[int(labels[i, 0, y, x]), y, x]))
        for k in range(1, c):
            truth = (labels[i, 0].numpy() == k).astype(float)
            scores.append(
                (2 * (probability[k] * truth).sum() + 1e-5) / (probability[k].sum() + truth.sum() + 1e-5)
            )
    return 0.5 * np.mean(entropy) + 0.5 * (1 - np.mean(scores))


def sample(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, size, size, generator=generator) * 2
    labels = torch.randint(0, 4, (3, 1, size, size), generator=generator).to(torch.uint8)
    labels[0] = 0  # a slice without any foreground
    return logits, labels


def test_dice_cross_entropy_equals_a_slow_loop():
    logits, labels = sample()
    assert dice_cross_entropy(logits, labels).item() == pytest.approx(
        slow_dice_cross_entropy(logits, labels), abs=1e-6
    )


def test_a_weight_multiplies_the_loss_of_its_slice():
    logits, labels = sample()
    weight = [0.5, 2.0, 1.0]
    slow = [w * slow_dice_cross_entropy(logits[[i]], labels[[i]]) for i, w in enumerate(weight)]
    found = dice_cross_entropy(logits, labels, torch.tensor(weight))
    assert found.item() == pytest.approx(np.mean(slow), abs=1e-6)
    halves = deep_supervision(
        dice_cross_entropy, [logits, logits], labels, weight=torch.tensor(weight)
    )  # 2/3 and 1/3 of the same
    assert halves.item() == pytest.approx(found.item(), abs=1e-6)


def test_dice_cross_entropy_gradient_equals_differences():
    logits, labels = sample(1, size=3)
    logits.requires_grad_()
    dice_cross_entropy(logits, labels).backward()
    for place in ((0, 0, 0, 0), (1, 2, 1, 2), (2, 3, 2, 0)):
        step = torch.zeros_like(logits)
        step[place] = 1e-3
        with torch.no_grad():
            difference = slow_dice_cross_entropy(logits + step, labels) - slow_dice_cross_entropy(
                logits - step, labels
            )
        assert logits.grad[place].item() == pytest.approx(difference / 2e-3, abs=1e-5)


def test_deep_supervision_weights_and_labels_by_hand():
    """Three scales: weights 4/7, 2/7, 1/7; nearest-exact takes pixel 1 of 0..1 and 2 of 0..3 (the centre's
    right).
    """
    labels = torch.arange(16).view(1, 1, 4, 4)
    outputs = [torch.zeros(1, 1, s, s) for s in (4, 2, 1)]
    seen = []

    def loss(output, scaled):
        seen.append(scaled.flatten().tolist())
        return scaled.float().sum()

    total = deep_supervision(loss, outputs, labels)
    assert seen == [list(range(16)), [5, 7, 13, 15], [10]]
    assert total.item() == pytest.approx((4 * 120 + 2 * 40 + 10) / 7)


def test_deep_supervision_averages_a_target_that_is_no_label():
    seen = []

    def loss(output, scaled):
        seen.append(scaled.flatten().tolist())
        return scaled.sum()

    deep_supervision(loss, [torch.zeros(1, 1, s, s) for s in (4, 2, 1)], torch.arange(16.0).view(1, 1, 4, 4))
    assert seen == [list(range(16)), [2.5, 4.5, 10.5, 12.5], [7.5]]


def test_losses_are_float32_under_autocast():
    logits, labels = sample()
    with torch.autocast("cpu", torch.bfloat16):
        loss = dice_cross_entropy(logits.bfloat16(), labels)
        reconstructed = masked_mse(logits.bfloat16(), logits, torch.ones_like(logits))
    assert loss.dtype == reconstructed.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_dice_cross_entropy(logits, labels), abs=2e-2)


def test_3d_dice_by_hand():
    truth, prediction = np.zeros((3, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)
    truth[0, 0, :4] = 1
    prediction[0, 0, 1:4] = 1
    prediction[1, 0, :3] = 1  # 4 true, 6 predicted, 3 shared
    truth[2, 2, 2] = 2  # missed
    assert dice(prediction, truth) == {"LV": pytest.approx(0.6), "MYO": 0.0, "RV": 1.0}
    with pytest.raises(ValueError, match="one shape"):
        dice(prediction, truth[:2])
