"""A slice that beats, as a GIF."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion

from cmrssp.data.subject import CLASSES
from cmrssp.evaluation.plots import CLASS_COLOURS
from cmrssp.files import atomic

_PIXELS = 300  # of the longer side
_LINE = 2  # pixels, on the inner side of a class's edge
_GREYS = 252  # of the palette's 256, which leaves the classes and one that Pillow needs for "unchanged"
_FRAME_S = 0.04  # where the true time step is unknown: 25 frames a second


def delays_ms(frames: int, frame_s: float | None) -> list[int]:
    """How long each frame of a GIF stays, in steps of 10 ms whose sum follows real time; never under 20 ms,
    which browsers slow down to 100 ms. 40 ms where `frame_s` is None or 0.
    """
    ends = np.round(np.arange(frames + 1) * (frame_s or _FRAME_S) * 100)
    return [int(10 * max(2, steps)) for steps in np.diff(ends)]


def enlarged(images: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """images (T, H, W) on square pixels, 300 along the longer side, bicubic: float32 (T, height, width)."""
    size_mm = np.array(images.shape[1:]) * spacing_mm
    height, width = (max(1, round(side)) for side in size_mm / size_mm.max() * _PIXELS)
    pictures = [Image.fromarray(image) for image in np.ascontiguousarray(images, np.float32)]
    return np.stack([np.asarray(p.resize((width, height), Image.Resampling.BICUBIC)) for p in pictures])


def animate(
    images: np.ndarray, labels: np.ndarray, spacing_mm: tuple[float, float], path: Path, frame_s: float | None
) -> None:
    """An endless GIF of one slice with the outlines of its classes, in real time where `frame_s` is known.

    images (T, H, W), grey from the lowest to the 99.5th percentile of all frames; labels (T, H, W) ids;
    spacing_mm (row, column).
    """
    if images.shape != labels.shape or images.ndim != 3:
        raise ValueError(f"animate: expected two (T, H, W) of one shape, got {images.shape}, {labels.shape}")
    images = np.nan_to_num(np.asarray(images, np.float32))
    low, high = images.min(), np.percentile(images, 99.5)
    grey = enlarged((images - low) / max(high - low, 1e-6), spacing_mm)
    frames = (grey.clip(0, 1) * (_GREYS - 1)).round().astype(np.uint8)
    shares = [enlarged(labels == id, spacing_mm) for id in range(1, len(CLASSES) + 1)]
    smooth = np.argmax([1 - sum(shares), *shares], axis=0)  # the class of most weight at each pixel
    for id in range(1, len(CLASSES) + 1):
        mask = smooth == id
        inside = binary_erosion(mask, np.ones((1, 3, 3), bool), iterations=_LINE)
        frames[mask & ~inside] = _GREYS + id - 1
    greys = np.linspace(0, 255, _GREYS).round().astype(np.uint8).repeat(3).tobytes()
    palette = greys + b"".join(bytes.fromhex(colour[1:]) for colour in CLASS_COLOURS.values())
    pictures = [Image.fromarray(frame) for frame in frames]
    for picture in pictures:
        picture.putpalette(palette)
    delays = delays_ms(len(frames), frame_s)
    with atomic(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], loop=0, duration=delays)
