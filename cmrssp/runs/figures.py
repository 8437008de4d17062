"""Pictures of a data set and of a training: the data report's sheet, views.png and curves.png."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from scipy.ndimage import map_coordinates

from cmrssp.data.batches import Batches
from cmrssp.data.store import Store
from cmrssp.data.subject import CLASSES
from cmrssp.files import atomic
from cmrssp.ssp.method import Method
from cmrssp.training import step_generator

BLUE, ORANGE = "#56B4E9", "#E69F00"  # Okabe and Ito: readers with colour blindness tell them apart
_CELL_PX = 160  # side of one subject's cell in the sheet of crop centres


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
            low, high = np.percentile(reference, (0.5, 99.5))
            cmap, low, high = ("viridis", 0, len(CLASSES)) if title == "label" else ("gray", low, high)
            axis.imshow(image, cmap=cmap, vmin=low, vmax=high)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title)
    save_figure(figure, path)


def curves(records: Sequence[dict], path: Path) -> None:
    """Losses, 3D Dice of a fine-tuning and health of a pretraining, each against the epoch."""
    dice = {"dice": "mean", **{f"dice_{name}": name for name in CLASSES}}
    explained = {"explained_variance": "training", "validation_explained_variance": "validation"}
    sheets = [
        ("loss", {"loss": "training", "validation_loss": "validation"}, None),
        ("3D Dice on the validation subjects", dice, (0, 1)),
        ("effective rank of the features", {"effective_rank": "plain validation slices"}, (1, None)),
        ("explained variance of the motion map", explained, (None, 1)),
        ("held-out R² of the slice's position", {"position_r2": "linear probe"}, (-0.2, 1)),
    ]
    sheets = [sheet for sheet in sheets if any(name in record for record in records for name in sheet[1])]
    figure = Figure(figsize=(4.6 * len(sheets), 3.4), layout="constrained")
    axes = figure.subplots(1, len(sheets), squeeze=False)[0]
    for axis, (title, names, limits) in zip(axes, sheets, strict=True):
        for name, label in names.items():
            points = [(r["epoch"], r[name]) for r in records if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=label)
        axis.set(xlabel="epoch", ylabel=title, ylim=limits)
        axis.legend()
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def centre_sheet(store: Store, path: Path, crop_mm: float, columns: int = 10) -> None:
    """A middle slice of every subject on one scale, with the crop centre found without labels, the crop's
    square, and the box around the labels of subjects that have them.
    """
    if not store.subjects:
        return
    columns = min(columns, len(store.subjects))
    rows = -(-len(store.subjects) // columns)
    mm = crop_mm * 1.2 / _CELL_PX  # of a pixel of the sheet: a cell shows a little more than the crop
    sheet = np.zeros((rows * _CELL_PX, columns * _CELL_PX), np.float32)
    squares: dict[str, list[np.ndarray]] = {BLUE: [], ORANGE: []}
    figure = Figure(figsize=(max(1.3 * columns, 5), 1.3 * rows + 0.4), layout="constrained")
    axis = figure.subplots()
    for i, (subject, cine) in enumerate(zip(store.subjects, store.cines, strict=True)):
        labels = store.labels[i] if store.labels else None
        frame = labels.ed or 0 if labels else 0
        image = store.slice(i, frame, cine.shape[1] // 2).astype(np.float32)
        centre, spacing = np.array(cine.centre), np.array(cine.geometry.spacing_mm)
        top, left = corner = np.array(divmod(i, columns)) * _CELL_PX
        offset_mm = (np.indices((_CELL_PX, _CELL_PX)) - _CELL_PX / 2) * mm
        cell = map_coordinates(image, offset_mm / spacing[:, None, None] + centre[:, None, None], order=1)
        sheet[top : top + _CELL_PX, left : left + _CELL_PX] = cell / max(np.percentile(image, 99.5), 1)
        middle, half = corner + _CELL_PX / 2, crop_mm / 2 / mm
        squares[ORANGE].append(_square(*(middle - half), *(middle + half)))
        if labels and labels.box:
            box = np.array(labels.box, float).reshape(2, 2).T  # first corner, last corner
            squares[BLUE].append(_square(*((box - centre) * spacing / mm + middle).ravel()))
        axis.plot(middle[1], middle[0], "+", color=ORANGE, markersize=6)
        axis.text(left + 4, top + 4, subject.key, color="white", fontsize=5, va="top", parse_math=False)
    axis.imshow(sheet, cmap="gray", vmin=0, vmax=1)
    for colour, lines in squares.items():
        axis.add_collection(LineCollection(lines, colors=colour, linewidths=0.8))
    axis.set(xticks=[], yticks=[])
    orange = f"orange: crop centre found without labels, and the {crop_mm:.0f} mm crop"
    axis.set_title(f"{orange}; blue: box of the labels", fontsize=8, loc="left")
    save_figure(figure, path)


def _square(top: float, left: float, bottom: float, right: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)])
