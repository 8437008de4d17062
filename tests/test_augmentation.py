import math

import pytest
import torch
from scipy.ndimage import gaussian_filter

from cmrssp import augmentation
from cmrssp.augmentation import (
    Ranges,
    apply,
    draw,
    gaussian_blur,
    intensity_,
    native_grid,
    paper_ranges,
    plain,
)


def batch(image, label=None, spacing=(1.0, 1.0), centre=None, mean=0.0, std=1.0):
    """A batch of equal geometry from images (B, H, W)."""
    count, height, width = image.shape
    centre = centre or ((height - 1) / 2, (width - 1) / 2)
    made = {
        "image": image[:, None],
        "spacing_mm": torch.tensor([spacing] * count),
        "centre": torch.tensor([centre] * count),
        "mean": torch.full((count,), mean),
        "std": torch.full((count,), std),
        "max": torch.full((count,), 1000.0),
    }
    return made if label is None else {**made, "label": label[:, None]}


def replace(draws, **changes):
    return augmentation.Draws(**{**vars(draws), **changes})


def test_plain_crop_at_native_spacing_is_the_standardised_image():
    image = torch.randint(0, 1000, (2, 20, 24), dtype=torch.int16)
    views = apply(
        batch(image, centre=(9.5, 13.5), mean=300.0, std=50.0), plain(2), image_size=8, spacing_mm=1.0
    )
    expected = (image[:, 6:14, 10:18].float() - 300) / 50
    assert (views["image"][:, 0] - expected).abs().max() < 2e-4


def test_what_lies_outside_the_file_is_zero_before_standardisation():
    image = torch.full((1, 8, 8), 100, dtype=torch.int16)
    view = apply(batch(image, mean=40.0, std=20.0), plain(1), image_size=32, spacing_mm=1.0)["image"]
    assert view[0, 0, 0, 0].item() == pytest.approx(-2.0) and view[0, 0, 16, 16].item() == pytest.approx(
        3.0, abs=1e-5
    )


def slow_positions(draws, i, size, spacing_mm, native_spacing, centre):
    """Native (row, column) of each target pixel, one by one: move, scale, flip, rotate."""
    angle = math.radians(draws.rotation_deg[i])
    for r in range(size):
        for c in range(size):
            row = (
                ((r - (size - 1) / 2) * spacing_mm + draws.translation_mm[i, 0])
                * draws.fov_factor[i]
                * draws.flip[i, 0]
            )
            column = (
                ((c - (size - 1) / 2) * spacing_mm + draws.translation_mm[i, 1])
                * draws.fov_factor[i]
                * draws.flip[i, 1]
            )
            yield (
                r,
                c,
                (math.cos(angle) * row - math.sin(angle) * column) / native_spacing[0] + centre[0],
                (math.sin(angle) * row + math.cos(angle) * column) / native_spacing[1] + centre[1],
            )


def cubic(t):
    """The cubic convolution kernel with a = -0.75 (Keys 1981), which torch uses."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def slow_bicubic(image, row, column):
    total = 0.0
    for r in range(math.floor(row) - 1, math.floor(row) + 3):
        for c in range(math.floor(column) - 1, math.floor(column) + 3):
            if 0 <= r < image.shape[0] and 0 <= c < image.shape[1]:
                total += float(image[r, c]) * cubic(row - r) * cubic(column - c)
    return total


def test_image_and_label_move_together_as_a_slow_loop_says():
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 100, (4, 40, 30), generator=generator).to(torch.int16)
    label = torch.randint(0, 4, (4, 40, 30), generator=generator).to(torch.uint8)
    native, centre, size, spacing = (1.3, 0.9), (19.0, 15.5), 12, 2.1
    draws = draw(4, Ranges(translation_mm=6.0), torch.Generator().manual_seed(0))
    draws = replace(
        draws,
        noise_std=torch.zeros(4),
        blur_sigma_px=torch.zeros(4, 2),
        brightness=torch.ones(4),
        shift=torch.zeros(4),
        gamma=torch.ones(4),
    )
    views = apply(batch(image, label, native, centre), draws, image_size=size, spacing_mm=spacing)
    clear = 0
    for i in range(4):
        for r, c, row, column in slow_positions(draws, i, size, spacing, native, centre):
            row, column = float(row), float(column)
            expected = slow_bicubic(image[i], row, column)
            assert views["image"][i, 0, r, c].item() == pytest.approx(expected, abs=0.02)
            nearest = (round(row), round(column))
            if abs(row - nearest[0]) < 0.49 and abs(column - nearest[1]) < 0.49:
                inside = 0 <= nearest[0] < 40 and 0 <= nearest[1] < 30
                assert views["label"][i, 0, r, c] == (label[i, nearest[0], nearest[1]] if inside else 0)
                clear += 1
    assert clear > 500 and views["label"].dtype == torch.uint8


def slow_bilinear(image, row, column):
    total = 0.0
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            if 0 <= r < image.shape[0] and 0 <= c < image.shape[1]:
                total += float(image[r, c]) * (1 - abs(row - r)) * (1 - abs(column - c))
    return total


def test_the_motion_map_moves_with_the_image_and_keeps_its_values():
    generator = torch.Generator().manual_seed(1)
    motion = torch.rand((2, 40, 30), generator=generator).half()
    draws = draw(2, Ranges(p_noise=1.0, p_blur=1.0), torch.Generator().manual_seed(0))
    seen = {**batch(torch.zeros(2, 40, 30), None, (1.3, 0.9), (19.0, 15.5)), "motion": motion[:, None]}
    found = apply(seen, draws, image_size=12, spacing_mm=2.1)["motion"]
    assert found.dtype == torch.float32
    for i in range(2):
        for r, c, row, column in slow_positions(draws, i, 12, 2.1, (1.3, 0.9), (19.0, 15.5)):
            expected = slow_bilinear(motion[i], float(row), float(column))
            assert found[i, 0, r, c].item() == pytest.approx(expected, abs=1e-4)


def test_a_larger_fov_factor_shows_more_of_the_body():
    image = torch.zeros((2, 256, 256), dtype=torch.int16)
    image[:, 96:160, 96:160] = 1000
    draws = replace(plain(2), fov_factor=torch.tensor([0.7, 1.4]))
    share = (
        (apply(batch(image), draws, image_size=128, spacing_mm=1.0)["image"] > 500).float().mean((1, 2, 3))
    )
    assert share[0].item() == pytest.approx((64 / (0.7 * 128)) ** 2, rel=0.03)
    assert share[1].item() == pytest.approx((64 / (1.4 * 128)) ** 2, rel=0.03)


def test_prediction_grid_is_the_inverse_of_the_plain_crop():
    """A label blown from the native grid to the crop and back is itself where the crop covers it."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = (rows * 2 + columns)[None]
    native = batch(image, spacing=(1.5, 1.2), centre=(30.2, 33.7))
    crop = apply(native, plain(1), image_size=40, spacing_mm=1.3)["image"]
    back = torch.nn.functional.grid_sample(
        crop, native_grid(native, image_size=40, spacing_mm=1.3), mode="bilinear", align_corners=True
    )[0, 0]
    half = 19.5 * 1.3
    covered = ((rows - 30.2).abs() * 1.5 < half - 2.6) & ((columns - 33.7).abs() * 1.2 < half - 2.6)
    assert covered.sum() > 800
    assert (back - image[0])[covered].abs().max() < 0.15  # a tenth of a pixel would be 0.2 to 0.3
    outside = ((rows - 30.2).abs() * 1.5 > half + 1.3) | ((columns - 33.7).abs() * 1.2 > half + 1.3)
    assert outside.any() and not back[outside].any()


def test_intensity_by_hand():
    image = torch.tensor([[-1.0, 0.0], [1.0, 3.0]])[None, None]
    draws = replace(
        plain(1), brightness=torch.tensor([1.5]), shift=torch.tensor([-0.5]), gamma=torch.tensor([2.0])
    )
    # x 1.5 - 0.5 = -2, -0.5, 1, 4; on [0, 1]: 0, 1/4, 1/2, 1; squared: 0, 1/16, 1/4, 1; back: x 6 - 2
    expected = torch.tensor([[-2.0, 6 / 16 - 2], [6 / 4 - 2, 4.0]])
    assert (intensity_(image.clone(), draws, torch.ones(len(image)))[0, 0] - expected).abs().max() < 1e-6
    constant = torch.full((1, 1, 4, 4), 2.0)
    assert torch.isfinite(intensity_(constant, draws, torch.ones(1))).all()


def test_noise_only_where_it_was_drawn():
    image = torch.zeros(3, 1, 64, 64)
    draws = replace(plain(3), noise_std=torch.tensor([0.0, 0.1, 0.2]), noise_seed=torch.full((3,), 5))
    std = intensity_(image.clone(), draws, torch.ones(len(image))).std(dim=(1, 2, 3))
    assert std.tolist() == pytest.approx([0.0, 0.1, 0.2], rel=0.05)
    again = [intensity_(image.clone(), draws, torch.ones(len(image))) for _ in range(2)]
    assert torch.equal(*again)


def test_blur_equals_scipy():
    image = torch.randn(2, 1, 30, 26, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([[0.5, 1.5], [1.2, 0.8]])
    blurred = gaussian_blur(image, sigma, radius=6)
    for i in range(2):
        expected = gaussian_filter(image[i, 0].double().numpy(), sigma[i].tolist(), mode="nearest", radius=6)
        assert abs(blurred[i, 0].numpy() - expected).max() < 1e-5


def test_blur_leaves_the_others_alone():
    image = torch.randn(3, 1, 30, 26)
    draws = replace(plain(3), blur_sigma_px=torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    changed = (intensity_(image.clone(), draws, torch.ones(len(image))) - image).abs().amax((1, 2, 3))
    assert changed[0] < 1e-5 and changed[2] < 1e-5 and changed[1] > 0.1


def test_draws_have_the_papers_ranges_and_probabilities():
    n = 20000
    draws = draw(n, paper_ranges(256, 1.25), torch.Generator().manual_seed(0))

    def uniform(values, low, high):
        assert values.min() >= low and values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert values.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.02)

    uniform(draws.rotation_deg, -180, 180)
    uniform(draws.fov_factor, 0.7, 1.4)
    uniform(draws.translation_mm, -50, 50)  # 40 px of 1.25 mm
    uniform(draws.brightness, 0.6, 1.5)
    uniform(draws.shift, -0.4, 0.4)
    uniform(draws.gamma, 0.7, 1.5)
    uniform(draws.noise_std[draws.noise_std > 0], 0.0, 0.2)
    uniform(draws.blur_sigma_px[draws.blur_sigma_px > 0], 0.5, 1.5)
    assert (draws.flip == -1).float().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert (draws.noise_std > 0).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert (draws.blur_sigma_px[:, 0] > 0).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert ((draws.blur_sigma_px[:, 0] > 0) == (draws.blur_sigma_px[:, 1] > 0)).all()


def test_draws_depend_on_the_generator_alone():
    first, second, other = (draw(5, Ranges(), torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    torch.manual_seed(99)
    assert all(
        (a == b).all() if torch.is_tensor(a) else a == b
        for a, b in zip(vars(first).values(), vars(second).values(), strict=True)
    )
    assert (first.rotation_deg != other.rotation_deg).all() and (first.noise_seed != other.noise_seed).all()


def test_autocast_does_not_coarsen_the_views():
    image = torch.randint(0, 1000, (1, 20, 20), dtype=torch.int16)
    plainly = apply(batch(image), plain(1), image_size=8, spacing_mm=1.0)["image"]
    with torch.autocast("cpu", torch.bfloat16):
        under = apply(batch(image), plain(1), image_size=8, spacing_mm=1.0)["image"]
    assert under.dtype == torch.float32 and (under == plainly).all()


def test_solarise_turns_what_is_bright_around_the_subjects_maximum():
    image = torch.tensor([[[-1.0, 0.5], [0.0, 2.0]]] * 2)[:, None]
    draws = replace(plain(2), solarise=torch.tensor([False, True]))
    out = intensity_(image.clone(), draws, torch.tensor([3.0, 3.0]))
    assert (out[0] - image[0]).abs().max() < 1e-6
    assert (out[1, 0] - torch.tensor([[-1.0, 2.5], [0.0, 1.0]])).abs().max() < 1e-6
