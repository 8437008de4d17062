"""Augmentation of a batch on its device, with one interpolation from the native grid to the network's.

`draw` takes all random numbers from a CPU generator, so that every device gets the same; `apply` is
deterministic. Order: affine sampling of raw intensities, z-score with the subject's mean and std, noise,
blur, brightness, shift, gamma, solarisation.

Read from a batch: image (B, 1, H, W), native and padded; spacing_mm and centre (B, 2), in native pixels, as
(row, column); mean, std and max (B,) of the subject's intensities; optionally label and motion (B, 1, H, W).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Ranges:
    """(low, high) of uniform draws, and probabilities p_*. Defaults: the paper's, for 256 px of 1.25 mm."""

    rotation_deg: float = 180.0  # +-
    fov_factor: tuple[float, float] = (0.7, 1.4)  # of the field of view: above 1 shows more of the body
    translation_mm: float = 50.0  # +- along each axis
    translation_scales: bool = True  # with the field of view; False: mm in the body
    p_flip: float = 0.5
    noise_std: tuple[float, float] = (0.0, 0.2)
    p_noise: float = 0.2
    blur_sigma_px: tuple[float, float] = (0.5, 1.5)
    p_blur: float = 0.2
    brightness: tuple[float, float] = (0.6, 1.5)
    p_brightness: float = 1.0
    shift: tuple[float, float] = (-0.4, 0.4)
    p_shift: float = 1.0
    gamma: tuple[float, float] = (0.7, 1.5)
    p_gamma: float = 1.0
    p_solarise: float = 0.0


def paper_ranges(image_size: int, spacing_mm: float) -> Ranges:
    """The paper's (baseline, SimCLR, PCL, MIM): its translation of 40 px in 256 is a share of the side."""
    return Ranges(translation_mm=40 / 256 * image_size * spacing_mm)


_NEVER = {field.name: 0.0 for field in fields(Ranges) if field.name.startswith("p_")}
_UNCHANGED = Ranges(rotation_deg=0.0, fov_factor=(1.0, 1.0), translation_mm=0.0, **_NEVER)


@dataclass(frozen=True)
class Draws:
    """What was drawn for B images: CPU tensors (B,), or (B, 2) as (row, column)."""

    rotation_deg: Tensor
    fov_factor: Tensor
    translation_mm: Tensor  # (B, 2), before the field-of-view factor
    flip: Tensor  # (B, 2), -1 or 1
    noise_std: Tensor  # 0: none
    noise_seed: Tensor  # int64: one seed for all images that were drawn together
    blur_sigma_px: Tensor  # (B, 2), 0: none
    brightness: Tensor
    shift: Tensor
    gamma: Tensor
    solarise: Tensor  # bool: x above 0 becomes the subject's maximum - x


def plain(count: int) -> Draws:
    """The centred crop, without augmentation."""
    return draw(count, _UNCHANGED, torch.Generator())


def draw(count: int, ranges: Ranges, generator: torch.Generator) -> Draws:
    """Random parameters for `count` images, from a CPU generator."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def chance(p: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) < p

    def maybe(p: float, between: tuple[float, float], otherwise: float) -> Tensor:
        return torch.where(chance(p), uniform(*between), otherwise)

    rotation, fov_factor = uniform(-ranges.rotation_deg, ranges.rotation_deg), uniform(*ranges.fov_factor)
    translation = uniform(-ranges.translation_mm, ranges.translation_mm, 2)
    return Draws(
        rotation_deg=rotation,
        fov_factor=fov_factor,
        translation_mm=translation if ranges.translation_scales else translation / fov_factor[:, None],
        flip=1 - 2 * chance(ranges.p_flip, 2).float(),
        noise_std=maybe(ranges.p_noise, ranges.noise_std, 0.0),
        noise_seed=torch.randint(2**62, (1,), generator=generator).expand(count),
        blur_sigma_px=torch.where(chance(ranges.p_blur, 1), uniform(*ranges.blur_sigma_px, 2), 0.0),
        brightness=maybe(ranges.p_brightness, ranges.brightness, 1.0),
        shift=maybe(ranges.p_shift, ranges.shift, 0.0),
        gamma=maybe(ranges.p_gamma, ranges.gamma, 1.0),
        solarise=chance(ranges.p_solarise) if ranges.p_solarise else torch.zeros(count, dtype=torch.bool),
    )


def augment(
    batch: Batch, ranges: Sequence[Ranges | None], generator: torch.Generator | None, **grid: float
) -> Batch:
    """For each of the ranges one augmented crop of each image, as `apply` gives it: (ranges x B, ...), those
    of the first ranges first. Without ranges or a generator the plain centred crop. `grid`: as for `apply`.
    """
    count = len(batch["image"])
    each = [draw(count, one, generator) if one and generator else plain(count) for one in ranges]
    draws = Draws(*(torch.cat([getattr(d, field.name) for d in each]) for field in fields(Draws)))
    if len(ranges) > 1:
        batch = {key: torch.cat([value] * len(ranges)) for key, value in batch.items()}
    return apply(batch, draws, **grid)


def apply(batch: Batch, draws: Draws, *, image_size: int, spacing_mm: float) -> Batch:
    """Native batch -> (B, 1, S, S) each: image float32, standardised; if given, label uint8, motion float32.
    Image bicubic, label nearest, motion linear, all 0 outside the native image. Intensity draws change the
    image alone. Without gradient.
    """
    with torch.no_grad(), torch.autocast(batch["image"].device.type, enabled=False):
        grid = sampling_grid(batch, draws, image_size=image_size, spacing_mm=spacing_mm)
        image = F.grid_sample(batch["image"].float(), grid, mode="bicubic", align_corners=True)
        image.sub_(_column(batch["mean"])).mul_(_column(1 / batch["std"]))
        brightest = (batch["max"] - batch["mean"]) / batch["std"]
        sampled = {"image": intensity_(image, draws, brightest)}
        if "label" in batch:
            label = F.grid_sample(batch["label"].float(), grid, mode="nearest", align_corners=True)
            sampled["label"] = label.to(torch.uint8)
        if "motion" in batch:
            sampled["motion"] = F.grid_sample(batch["motion"].float(), grid, align_corners=True)
        return sampled


def sampling_grid(batch: Batch, draws: Draws, *, image_size: int, spacing_mm: float) -> Tensor:
    """(B, S, S, 2) for grid_sample: the native position of each target pixel. Its place in mm from the middle
    is translated, scaled by the field-of-view factor, flipped and rotated, and counts from the crop centre.
    """
    device = batch["image"].device
    axis = (torch.arange(image_size, device=device) - (image_size - 1) / 2) * spacing_mm
    drawn = (draws.translation_mm, draws.fov_factor, draws.flip, torch.deg2rad(draws.rotation_deg))
    translation, fov_factor, flip, angle = _to(device, *drawn)
    rows = (axis[None] + translation[:, :1]) * (fov_factor * flip[:, 0])[:, None]  # (B, S) mm
    columns = (axis[None] + translation[:, 1:]) * (fov_factor * flip[:, 1])[:, None]
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    height, width = batch["spacing_mm"][:, :1], batch["spacing_mm"][:, 1:]  # of a native pixel
    by_row = (cos * rows / height, sin * rows / width)
    by_column = (-sin * columns / height, cos * columns / width)
    return _grid(batch["centre"], by_row, by_column, batch["image"].shape[2:])


def native_grid(batch: Batch, *, image_size: int, spacing_mm: float) -> Tensor:
    """(B, H, W, 2) for grid_sample: the position of each native pixel in the plain centred crop."""
    rows, columns = (
        (torch.arange(n, device=batch["image"].device)[None] - batch["centre"][:, i : i + 1])
        * (batch["spacing_mm"][:, i : i + 1] / spacing_mm)
        for i, n in enumerate(batch["image"].shape[2:])
    )
    middle = torch.full_like(batch["centre"], (image_size - 1) / 2)
    by_row, by_column = (rows, torch.zeros_like(rows)), (torch.zeros_like(columns), columns)
    return _grid(middle, by_row, by_column, (image_size, image_size))


def _grid(
    origin: Tensor, by_row: Sequence[Tensor], by_column: Sequence[Tensor], size: Sequence[int]
) -> Tensor:
    """(B, R, C, 2): pixel positions in an image of `size` as grid_sample's (x, y) in [-1, 1], align_corners.
    Each is origin (B, 2) plus the offsets of its grid row, two (B, R), and of its grid column, two (B, C).
    """
    rows, columns = by_row[0].shape[1], by_column[1].shape[1]
    grid = origin.new_empty(len(origin), 2, rows, columns)
    for i in (0, 1):
        scale = 2 / (size[i] - 1)
        of_row = (by_row[i] + origin[:, i, None]) * scale - 1
        torch.add(of_row[:, :, None], (by_column[i] * scale)[:, None], out=grid[:, 1 - i])
    return grid.permute(0, 2, 3, 1)


def intensity_(image: Tensor, draws: Draws, brightest: Tensor) -> Tensor:
    """Noise, blur, brightness, shift, gamma and solarisation of standardised images (B, 1, H, W), in place.
    brightest (B,): the standardised maximum of each subject. Gamma acts on the image rescaled to [0, 1];
    scaling back applies brightness and shift in the same pass.
    """
    device = image.device
    brightness, shift, gamma = _to(device, draws.brightness, draws.shift, draws.gamma)
    noisy = draws.noise_std.nonzero()[:, 0]  # on the CPU, so that nothing waits for the device
    if len(noisy):
        seeds, counts = draws.noise_seed[noisy].unique_consecutive(return_counts=True)
        noise = image.new_empty(len(noisy), *image.shape[1:])
        for seed, part in zip(seeds.tolist(), noise.split(counts.tolist()), strict=True):
            part.normal_(generator=torch.Generator(device).manual_seed(seed))
        rows, std = _to(device, noisy, draws.noise_std[noisy])
        image.index_add_(0, rows, noise.mul_(_column(std)))
    is_blurred = draws.blur_sigma_px.sum(dim=1) > 0
    for seed in draws.noise_seed[is_blurred].unique_consecutive():
        blurred = (is_blurred & (draws.noise_seed == seed)).nonzero()[:, 0]
        radius = int(4 * float(draws.blur_sigma_px[blurred].max()) + 0.5)
        rows, sigma = _to(device, blurred, draws.blur_sigma_px[blurred])
        image.index_copy_(0, rows, gaussian_blur(image[rows], sigma, radius))
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    span = (high - low).clamp_min_(1e-7)
    image.sub_(low).mul_(1 / span).clamp_(0, 1).pow_(_column(gamma))
    image.mul_(span * _column(brightness)).add_(low * _column(brightness) + _column(shift))
    solarised = draws.solarise.nonzero()[:, 0]
    if len(solarised):
        (rows,) = _to(device, solarised)
        old = image[rows]
        image.index_copy_(0, rows, torch.where(old > 0, _column(brightest)[rows] - old, old))
    return image


def gaussian_blur(image: Tensor, sigma_px: Tensor, radius: int) -> Tensor:
    """Separable Gaussian blur of images (B, 1, H, W), sigma (B, 2) px, cut at `radius` px; edges repeated."""
    count, _, height, width = image.shape
    taps = torch.arange(-radius, radius + 1, device=image.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sigma_px[:, :, None]) ** 2)
    kernel = kernel / kernel.sum(dim=2, keepdim=True)
    image = F.pad(image, (radius,) * 4, mode="replicate").transpose(0, 1)  # one channel per image
    image = F.conv2d(image, kernel[:, 0].view(count, 1, -1, 1), groups=count)
    image = F.conv2d(image, kernel[:, 1].view(count, 1, 1, -1), groups=count)
    return image.view(count, 1, height, width)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _to(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device, non_blocking=True) for tensor in tensors]
