"""Augmentation of a whole batch on its own device: one interpolation from the native grid to the network's
grid.

`draw` takes every random number from the generator it is given (a CPU one: the same numbers on any device);
`apply` is deterministic given them. Order: affine sampling of raw intensities -> z-score with the subject's
mean and std -> noise -> blur -> brightness -> shift -> gamma -> solarise. One `Recipe` holds ranges and
probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cmrssp.data.batches import Batch


@dataclass(frozen=True)
class Recipe:
    """Ranges (low, high) of uniform draws, and probabilities p_*; the defaults are the paper's at 256 px of
    1.25 mm.
    """

    rotation_deg: float = 180.0  # +-
    zoom: tuple[float, float] = (0.7, 1.4)  # field-of-view factor: above 1 shows more of the body
    translation_mm: float = 50.0  # +- along each axis, before the zoom
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
    translation_zoomed: bool = True  # False: the translation is that of the crop's centre, whatever the zoom


def paper_recipe(image_size: int, spacing_mm: float) -> Recipe:
    """Of the baseline, SimCLR, PCL and MIM. 40 px of 256: a smaller field of view moves by the same share of
    it.
    """
    return Recipe(translation_mm=40 / 256 * image_size * spacing_mm)


@dataclass(frozen=True)
class Draws:
    """What was drawn for B images. Tensors (B,) or (B, 2) on the CPU in float32; pairs are (row, column)."""

    rotation_deg: torch.Tensor
    zoom: torch.Tensor
    translation_mm: torch.Tensor  # (B, 2), before the zoom
    flip: torch.Tensor  # (B, 2), -1 or 1
    noise_std: torch.Tensor  # 0: none
    noise_seed: int
    blur_sigma_px: torch.Tensor  # (B, 2), 0: none
    brightness: torch.Tensor
    shift: torch.Tensor
    gamma: torch.Tensor
    solarise: torch.Tensor  # bool: what is above 0 becomes the subject's maximum minus itself


def plain(count: int) -> Draws:
    """The centred crop, nothing changed."""
    one, zero = torch.ones(count), torch.zeros(count)
    pair = torch.zeros(count, 2)
    return Draws(
        rotation_deg=zero,
        zoom=one,
        translation_mm=pair,
        flip=torch.ones(count, 2),
        noise_std=zero,
        noise_seed=0,
        blur_sigma_px=pair,
        brightness=one,
        shift=zero,
        gamma=one,
        solarise=zero.bool(),
    )


def draw(count: int, recipe: Recipe, generator: torch.Generator) -> Draws:
    """Random parameters for `count` images, every one of them from `generator` (on the CPU)."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def chance(p: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator) < p

    none = plain(count)
    rotation, zoom = uniform(-recipe.rotation_deg, recipe.rotation_deg), uniform(*recipe.zoom)
    translation = uniform(-recipe.translation_mm, recipe.translation_mm, 2)
    return Draws(
        rotation_deg=rotation,
        zoom=zoom,
        translation_mm=translation if recipe.translation_zoomed else translation / zoom[:, None],
        flip=1 - 2 * chance(recipe.p_flip, 2).float(),
        noise_std=torch.where(chance(recipe.p_noise), uniform(*recipe.noise_std), none.noise_std),
        noise_seed=int(torch.randint(2**62, (1,), generator=generator)),
        blur_sigma_px=torch.where(
            chance(recipe.p_blur, 1), uniform(*recipe.blur_sigma_px, 2), none.blur_sigma_px
        ),
        brightness=torch.where(chance(recipe.p_brightness), uniform(*recipe.brightness), none.brightness),
        shift=torch.where(chance(recipe.p_shift), uniform(*recipe.shift), none.shift),
        gamma=torch.where(chance(recipe.p_gamma), uniform(*recipe.gamma), none.gamma),
        solarise=chance(recipe.p_solarise) if recipe.p_solarise else none.solarise,
    )


def views(
    batch: Batch,
    recipe: Recipe | None,
    generator: torch.Generator | None,
    *,
    image_size: int,
    spacing_mm: float,
) -> dict[str, torch.Tensor]:
    """One augmented view of a batch; the plain centred crop without a recipe or without a generator."""
    count = len(batch["image"])
    draws = draw(count, recipe, generator) if recipe and generator else plain(count)
    return apply(batch, draws, image_size=image_size, spacing_mm=spacing_mm)


def apply(batch: Batch, draws: Draws, *, image_size: int, spacing_mm: float) -> dict[str, torch.Tensor]:
    """Native batch -> image (B, 1, S, S) float32, standardised; label (B, 1, S, S) uint8 where the batch has
    one.

    Without gradient, on the batch's device. Image bicubic, label nearest, both zero outside the native image.
    """
    with torch.no_grad(), torch.autocast(batch["image"].device.type, enabled=False):
        grid = sampling_grid(batch, draws, image_size=image_size, spacing_mm=spacing_mm)
        image = F.grid_sample(batch["image"].float(), grid, mode="bicubic", align_corners=True)
        image.sub_(_column(batch["mean"])).mul_(_column(1 / batch["std"]))
        brightest = (batch["max"] - batch["mean"]) / batch["std"]
        views = {"image": intensity_(image, draws, brightest)}
        if "label" in batch:
            label = F.grid_sample(batch["label"].float(), grid, mode="nearest", align_corners=True)
            views["label"] = label.to(torch.uint8)
        return views


def sampling_grid(batch: Batch, draws: Draws, *, image_size: int, spacing_mm: float) -> torch.Tensor:
    """(B, S, S, 2) for grid_sample: where in the native image each target pixel looks.

    A target pixel, in mm from the middle of the target image, is moved by the translation, scaled by the
    zoom, flipped and rotated, all about the subject's crop centre.
    """
    device = batch["image"].device
    axis = (torch.arange(image_size, device=device) - (image_size - 1) / 2) * spacing_mm
    translation, zoom, flip, angle = _to(
        device, draws.translation_mm, draws.zoom, draws.flip, torch.deg2rad(draws.rotation_deg)
    )
    rows = (axis[None] + translation[:, :1]) * (zoom * flip[:, 0])[:, None]  # (B, S) mm
    columns = (axis[None] + translation[:, 1:]) * (zoom * flip[:, 1])[:, None]
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    height, width = batch["spacing_mm"][:, :1], batch["spacing_mm"][:, 1:]  # of a native pixel
    return _grid(
        batch["centre"],
        (cos * rows / height, sin * rows / width),
        (-sin * columns / height, cos * columns / width),
        batch["image"].shape[2:],
    )


def native_grid(batch: Batch, *, image_size: int, spacing_mm: float) -> torch.Tensor:
    """(B, Hmax, Wmax, 2) for grid_sample: where in the plain centred crop each native pixel lies."""
    rows, columns = (
        (torch.arange(n, device=batch["image"].device)[None] - batch["centre"][:, i : i + 1])
        * (batch["spacing_mm"][:, i : i + 1] / spacing_mm)
        for i, n in enumerate(batch["image"].shape[2:])
    )
    middle = torch.full_like(batch["centre"], (image_size - 1) / 2)
    by_row, by_column = (rows, torch.zeros_like(rows)), (torch.zeros_like(columns), columns)
    return _grid(middle, by_row, by_column, (image_size, image_size))


def _grid(
    origin: torch.Tensor,
    by_row: tuple[torch.Tensor, torch.Tensor],
    by_column: tuple[torch.Tensor, torch.Tensor],
    size: Sequence[int],
) -> torch.Tensor:
    """(B, R, C, 2): positions in an image of `size` as grid_sample's (x, y) in [-1, 1], align_corners=True.

    A position (row, column), in pixels, is origin (B, 2) plus what its row of the grid adds, two (B, R), plus
    what its column adds, two (B, C): one pass over the large tensor for each coordinate.
    """
    rows, columns = by_row[0].shape[1], by_column[1].shape[1]
    grid = origin.new_empty(len(origin), 2, rows, columns)
    for i in (0, 1):
        scale = 2 / (size[i] - 1)
        of_row = (by_row[i] + origin[:, i, None]) * scale - 1
        torch.add(of_row[:, :, None], (by_column[i] * scale)[:, None], out=grid[:, 1 - i])
    return grid.permute(0, 2, 3, 1)


def intensity_(image: torch.Tensor, draws: Draws, brightest: torch.Tensor) -> torch.Tensor:
    """Noise, blur, brightness, shift, gamma and solarisation of standardised images (B, 1, H, W), in place.

    brightest (B,): the standardised maximum of each image's subject. Gamma acts on an image rescaled to its
    own minimum and maximum, which brightness and shift move along: they are taken in on the way back.
    """
    device = image.device
    brightness, shift, gamma = _to(device, draws.brightness, draws.shift, draws.gamma)
    noisy = draws.noise_std.nonzero()[:, 0]  # on the CPU: knowing who gets it costs no wait for the device
    if len(noisy):
        noise_generator = torch.Generator(device).manual_seed(draws.noise_seed)
        noise = torch.randn((len(noisy), *image.shape[1:]), device=device, generator=noise_generator)
        rows, std = _to(device, noisy, draws.noise_std[noisy])
        image.index_add_(0, rows, noise.mul_(_column(std)))
    blurred = draws.blur_sigma_px.sum(dim=1).nonzero()[:, 0]
    if len(blurred):
        rows, sigma = _to(device, blurred, draws.blur_sigma_px[blurred])
        radius = int(4 * float(draws.blur_sigma_px.max()) + 0.5)
        image.index_copy_(0, rows, gaussian_blur(image[rows], sigma, radius))
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    span = (high - low).clamp_min_(1e-7)
    image.sub_(low).mul_(1 / span).clamp_(0, 1).pow_(_column(gamma))
    image.mul_(span * _column(brightness)).add_(low * _column(brightness) + _column(shift))
    solarised = draws.solarise.nonzero()[:, 0]
    if len(solarised):
        (rows,) = _to(device, solarised)
        chosen = image[rows]
        image.index_copy_(0, rows, torch.where(chosen > 0, _column(brightest)[rows] - chosen, chosen))
    return image


def gaussian_blur(image: torch.Tensor, sigma_px: torch.Tensor, radius: int) -> torch.Tensor:
    """Separable Gaussian blur of images (B, 1, H, W), cut at `radius` px; sigma (B, 2) px; edges repeated."""
    count, _, height, width = image.shape
    taps = torch.arange(-radius, radius + 1, device=image.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sigma_px[:, :, None]) ** 2)
    kernel = kernel / kernel.sum(dim=2, keepdim=True)
    image = F.pad(image, (radius,) * 4, mode="replicate").view(
        1, count, height + 2 * radius, width + 2 * radius
    )
    image = F.conv2d(image, kernel[:, 0].view(count, 1, -1, 1), groups=count)
    image = F.conv2d(image, kernel[:, 1].view(count, 1, 1, -1), groups=count)
    return image.view(count, 1, height, width)


def _column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def _to(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(device, non_blocking=True) for tensor in tensors]
