"""Outlines of label maps on images: the contour sheet, and an animation of one slice."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from skimage.measure import find_contours
from skimage.morphology import erosion
from skimage.transform import resize

from cmrssp.data.store import Store
from cmrssp.data.subject import CLASSES
from cmrssp.evaluation.plots import CLASS_COLOURS
from cmrssp.files import atomic
from cmrssp.runs.figures import BLUE, ORANGE, save_figure

Case = tuple[int, int, str, np.ndarray]  # subject, frame, title, predicted label map (Z, H, W)
_SQUARE_MM = 160.0  # side of what is shown
_GIF_PX = 300  # the longer side
_LINE_PX = 2  # width of an outline, on the inner side of a class's edge
_GREYS = 252  # of the palette's 256: the classes and one that Pillow needs for "unchanged" take the rest


def around(centre: Sequence[float], spacing_mm: Sequence[float]) -> tuple[slice, slice]:
    """Rows and columns of a 160 mm square around a centre (row, column), within the image."""
    half = [_SQUARE_MM / 2 / spacing for spacing in spacing_mm]
    return tuple(slice(max(0, int(c - h)), int(c + h) + 1) for c, h in zip(centre, half, strict=True))


def contour_sheet(store: Store, cases: Sequence[Case], path: Path, columns: int = 4) -> None:
    """A row per case: contours of prediction and any reference on evenly spread slices, base on the left."""
    figure = Figure(figsize=(2.3 * columns, 2.45 * len(cases) + 0.4))
    axes = figure.subplots(len(cases), columns, squeeze=False)
    for row, (subject, frame, title, prediction) in zip(axes, cases, strict=True):
        outlines = [(store.label_volume(subject, frame), BLUE)] if store.labels else []
        outlines.append((prediction, ORANGE))
        slices = np.flatnonzero(outlines[0][0].any(axis=(1, 2)))
        slices = slices if len(slices) else np.arange(len(prediction))
        chosen = slices[np.unique(np.linspace(0, len(slices) - 1, columns).round().astype(int))]
        cine = store.cines[subject]
        spacing = cine.geometry.spacing_mm
        square = (slice(None), *around(cine.centre, spacing))
        image = store.volume(subject, frame)[square]
        grey = {"cmap": "gray", "vmin": 0, "vmax": np.percentile(image, 99.5)}
        for axis in row[len(chosen) :]:
            axis.set_axis_off()
        for axis, z in zip(row, chosen, strict=False):
            axis.imshow(image[z], aspect=spacing[0] / spacing[1], **grey)
            for labels, colour in outlines:
                for id in range(1, len(CLASSES) + 1):
                    mask = np.pad(labels[square][z] == id, 1)  # closed also at the edge of the square
                    for line in find_contours(mask.astype(float), 0.5):
                        axis.plot(line[:, 1] - 1, line[:, 0] - 1, color=colour, linewidth=1.1)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"slice {z + 1} of {len(image)}", fontsize=7)
        row[0].set_title(title, loc="left", fontsize=9, parse_math=False)
    legend = f"orange: prediction; {_SQUARE_MM:.0f} mm square around the crop centre"
    legend = "blue: reference, " * bool(store.labels) + legend
    axes[-1, 0].text(0, -0.25, legend, transform=axes[-1, 0].transAxes, fontsize=9)
    save_figure(figure, path)


def delays_ms(frames: int, frame_s: float | None) -> list[int]:
    """How long a GIF shows each frame, in steps of 10 ms that follow real time; 40 ms if `frame_s` is None.
    At least 20 ms, because browsers show shorter ones for 100 ms.
    """
    ends = np.round(np.arange(frames + 1) * (frame_s or 0.04) * 100)
    return [int(10 * max(2, steps)) for steps in np.diff(ends)]


def animate(
    images: np.ndarray, labels: np.ndarray, spacing_mm: tuple[float, float], path: Path, frame_s: float | None
) -> None:
    """Write an endless GIF of one slice with the outlines of its classes, `frame_s` seconds a frame. images,
    labels (T, H, W), grey from the lowest value to the 99.5th percentile; spacing_mm (row, column).
    """
    images = np.nan_to_num(np.asarray(images, np.float32))
    low, high = images.min(), np.percentile(images, 99.5)
    size_mm = np.array(images.shape[1:]) * spacing_mm
    size = [max(1, round(side)) for side in size_mm / size_mm.max() * _GIF_PX]  # square pixels
    greys = np.linspace(0, 255, _GREYS).round().astype(np.uint8).repeat(3).tobytes()
    palette = greys + b"".join(bytes.fromhex(colour[1:]) for colour in CLASS_COLOURS.values())
    pictures = []
    for image, label in zip((images - low) / max(high - low, 1e-6), labels, strict=True):
        grey = resize(image, size, order=3, mode="edge")
        frame = (grey.clip(0, 1) * (_GREYS - 1)).round().astype(np.uint8)
        masks = [(label == id).astype(np.float32) for id in range(len(CLASSES) + 1)]
        smooth = np.argmax([resize(mask, size, order=1, mode="edge") for mask in masks], axis=0)
        for id in range(1, len(CLASSES) + 1):
            inside = erosion(smooth == id, np.ones((2 * _LINE_PX + 1,) * 2))
            frame[(smooth == id) & ~inside] = _GREYS + id - 1
        pictures.append(Image.fromarray(frame))
        pictures[-1].putpalette(palette)
    with atomic(path) as file:
        delays = delays_ms(len(pictures), frame_s)
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], loop=0, duration=delays)
