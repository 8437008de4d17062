"""Pictures of a data set and of a training: the data report's sheet, views.png and curves.png."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cmrssp.data.batches import Batches
from cmrssp.data.store import Store
from cmrssp.data.subject import CLASSES
from cmrssp.files import atomic
from cmrssp.ssp.method import Method
from cmrssp.training import step_generator

BLUE, ORANGE = "#56B4E9", "#E69F00"  # Okabe and Ito: readers with colour blindness tell them apart


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=dpi, bbox_inches="tight")


@torch.inference_mode()
def views(method: Method, loader: Batches, path: Path) -> None:
    """What a method sees, and makes, of at most six slices, the same ones in every run."""
    method.eval()
    batch = next(iter(loader.in_order(6)))
    panel_sheet(method.panels(method.views(batch, step_generator(0, 0, 0))), path)
    method.train()


def panel_sheet(panels: dict[str, torch.Tensor], path: Path) -> None:
    """One row per title, one column per image; each column has one grey scale. Images (B, 1, H, W)."""
    images = {title: image[:, 0].float().cpu().numpy() for title, image in panels.items()}
    first = next(iter(images.values()))
    figure = Figure(figsize=(1.8 * len(first), 1.9 * len(images)))
    axes = figure.subplots(len(images), len(first), squeeze=False)
    for row, (title, stack) in zip(axes, images.items(), strict=True):
        for axis, image, reference in zip(row, stack, first, strict=True):
            cmap, (low, high) = "gray", np.percentile(reference, (0.5, 99.5))
            if title == "label":
                cmap, low, high = "viridis", 0, len(CLASSES)
            axis.imshow(image, cmap=cmap, vmin=low, vmax=high)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title)
    save_figure(figure, path)


def curves(records: Sequence[dict], path: Path) -> None:
    """Losses, 3D Dice of a fine-tuning and health of a pretraining, each against the epoch."""
    explained = {"explained_variance": "training", "validation_explained_variance": "validation"}
    sheets = [
        ("loss", {"loss": "training", "validation_loss": "validation"}, None),
        ("3D Dice, validation", {"dice": "mean", **{f"dice_{name}": name for name in CLASSES}}, (0, 1)),
        ("effective rank of the features", {"effective_rank": "plain validation slices"}, (1, None)),
        ("explained variance of the motion map", explained, (None, 1)),
        ("held-out R² of the slice's position", {"position_r2": "linear probe"}, (-0.2, 1)),
    ]
    sheets = [sheet for sheet in sheets if any(name in record for record in records for name in sheet[1])]
    figure = Figure(figsize=(4.6 * len(sheets), 3.4), layout="constrained")
    for axis, (title, names, limits) in zip(
        figure.subplots(1, len(sheets), squeeze=False)[0], sheets, strict=True
    ):
        for name, label in names.items():
            if points := [(r["epoch"], r[name]) for r in records if r.get(name) is not None]:
                axis.plot(*zip(*points, strict=True), marker=".", label=label)
        axis.set(xlabel="epoch", ylabel=title, ylim=limits)
        axis.legend()
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def centre_sheet(store: Store, path: Path, crop_mm: float) -> None:
    """A middle slice of every subject on one scale, with crop centre, crop square and box of the labels."""
    columns = min(10, len(store.subjects))
    rows, side = -(-len(store.subjects) // columns), 1.2 * crop_mm  # of a cell: a little more than the crop
    figure = Figure(figsize=(max(1.3 * columns, 5), 1.3 * rows + 0.4), layout="constrained")
    axis = figure.subplots()
    for i, (subject, cine, labels) in enumerate(zip(store.subjects, store.cines, store.labels, strict=True)):
        image = store.slice(i, labels.ed or 0, cine.shape[1] // 2)
        corner, spacing = side * np.array(divmod(i, columns)), np.array(cine.geometry.spacing_mm)
        middle = corner + side / 2
        origin = middle - spacing * cine.centre  # of the image: the middle of its first pixel, on the sheet
        (top, left), (bottom, right) = origin - spacing / 2, origin + spacing * (np.array(image.shape) - 0.5)
        brightest = max(np.percentile(image, 99.5), 1)
        shown = axis.imshow(image, cmap="gray", vmin=0, vmax=brightest, extent=(left, right, bottom, top))
        shown.set_clip_path(Rectangle(corner[::-1], side, side, transform=axis.transData))
        _draw_box(axis, middle - crop_mm / 2, middle + crop_mm / 2, ORANGE)
        if labels.box:
            first, last = np.array(labels.box, float).reshape(2, 2).T
            _draw_box(axis, origin + spacing * first, origin + spacing * last, BLUE)
        axis.plot(middle[1], middle[0], "+", color=ORANGE, markersize=6)
        place = corner[::-1] + 0.03 * side
        axis.text(*place, subject.key, color="white", fontsize=5, va="top", parse_math=False)
    axis.set(xticks=[], yticks=[], xlim=(0, columns * side), ylim=(rows * side, 0), facecolor="black")
    orange = f"orange: crop centre found without labels, and the {crop_mm:.0f} mm crop"
    axis.set_title(f"{orange}; blue: box of the labels", fontsize=8, loc="left")
    save_figure(figure, path)


def _draw_box(axis: Axes, first: np.ndarray, last: np.ndarray, colour: str) -> None:
    """Corners as (row, column)."""
    height, width = last - first
    axis.add_patch(Rectangle(first[::-1], width, height, fill=False, color=colour, linewidth=0.8))
