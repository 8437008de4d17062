import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from cmrssp.data import dataset, store
from cmrssp.evaluation import contours, plots

NAN = float("nan")
CLASSES = ("LV", "MYO", "RV")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of what other tests left to the collector
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved while the test runs; with few pixels, which is faster."""
    found: list[Figure] = []
    save = plots.save_figure
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path, dpi: found.append(figure) or save(figure, path, dpi=72)
    )
    return found


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def assert_printable(figure: Figure, path: Path) -> None:
    """The picture fits 170 mm, and stretched to that all text has 7 pt or more."""
    with Image.open(path) as picture:
        stretch = 170 / (picture.width / picture.info["dpi"][0] * 25.4)
    assert stretch >= 1
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert min(text.get_fontsize() for text in texts) * stretch >= 7


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Tick labels, titles, axis labels and panels that are drawn over each other."""
    figure.draw_without_rendering()
    boxes = []
    for axis in figure.axes:
        low, high = axis.get_xlim()
        ticks = [label for label in axis.get_xticklabels() if low <= label.get_position()[0] <= high]
        for text in (*ticks, axis.title, axis.xaxis.label, axis.yaxis.label):
            words, box = text.get_text(), text.get_window_extent()
            if words and text.get_visible():
                top = box.y0 + box.height / 2 if words[0] == "\n" else box.y1
                boxes.append((words, Bbox.from_extents(box.x0, box.y0, box.x1, top)))
        boxes.append((f"panel {axis.get_title()}", axis.get_window_extent()))
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, two in boxes[:i] if one.overlaps(two)]


def test_bland_altman_draws_these_lines(tmp_path, drawn):
    pairs = {
        "lv_edv_ml": (np.array([11.0, 13, 15, NAN]), np.array([10.0, 10, 10, 3])),
        "lv_ef_percent": (np.array([50.0]), np.array([40.0])),
        "rv_ef_percent": (np.array([NAN, NAN]), np.array([40.0, 50])),
        "lv_mass_g": (np.array([90.0, 100]), np.array([90.0, 100])),
    }
    plots.bland_altman(pairs, tmp_path / "a.png")
    (figure,) = drawn
    first, one, none, same = figure.axes
    lines = {(to_hex(line.get_color()), line.get_linestyle()): line.get_ydata()[0] for line in first.lines}
    assert lines["#000000", "-"] == 3.0
    assert [line.get_ydata()[0] for line in first.lines if line.get_linestyle() == "--"] == pytest.approx(
        [6.92, -0.92]
    )
    assert first.collections[0].get_offsets().tolist()[:3] == [[10.5, 1], [11.5, 3], [12.5, 5]]
    assert first.get_title() == "LV EDV, N = 3 of 4" and same.get_title() == "LV MASS, N = 2"
    assert {"bias: +3.0", "+1.96 SD: +6.9", "−1.96 SD: −0.9"} <= set(words(figure))
    for axis, title in ((one, "LV EF, N = 1"), (none, "RV EF, N = 0 of 2")):
        assert axis.get_title() == title and not axis.lines
    assert first.get_xlabel() == "mean of both (ml)" and one.get_ylabel() == "measured − reference (%)"
    assert_printable(figure, tmp_path / "a.png")
    assert not overlapping(figure)


def test_bins_of_position_by_hand():
    position = [0.0, 0.05, 0.09, 0.099, 0.1, 0.95, 1.0, NAN, 0.5, 0.55]
    table = plots.binned(position, [0.1, 0.2, 0.3, 0.4, 0.9, 0.5, 0.7, 0.3, NAN, 0.8])
    assert table[0] == pytest.approx([4, 0.175, 0.25, 0.325])  # a quarter of the way from 0.1 to 0.4, ...
    assert table[1] == pytest.approx([1, 0.9, 0.9, 0.9])  # 0.1 belongs to the second bin
    assert table[5] == pytest.approx([1, 0.8, 0.8, 0.8])  # 0.5 has no Dice
    assert table[9] == pytest.approx([2, 0.55, 0.6, 0.65])  # the apex belongs to the last bin
    assert table[[2, 3, 4, 6, 7, 8], 0].tolist() == [0] * 6 and np.isnan(table[[2, 3, 4, 6, 7, 8], 1:]).all()
    assert np.isnan(plots.binned([], [])[:, 1:]).all()


def slices_of(subjects: int, names=CLASSES, phases=("ED", "ES")) -> list[dict]:
    return [
        {"subject": f"s{s}", "position": z / 9, "phase": phase, "class": name, "dice": 0.9 - z / 50 - s / 100}
        for s in range(subjects) for z in range(10) for phase in phases for name in names
    ]  # fmt: skip


def test_dice_by_position_draws_the_medians(tmp_path, drawn):
    plots.dice_by_position(slices_of(3), tmp_path / "a.png")
    above, other, below, _ = drawn[0].axes
    assert above.get_title() == "ED, N = 3 subjects" and other.get_title() == "ES, N = 3 subjects"
    # slice 4 of 10 lies at 0.44: median over subjects 0.9 - 4 / 50 - 0.01
    assert above.lines[0].get_ydata()[4] == pytest.approx(0.81)
    assert sorted(bar.get_height() for bar in below.patches) == [3] * 30
    assert len({(line.get_marker(), line.get_linestyle()) for line in above.lines}) == 3
    assert_printable(drawn[0], tmp_path / "a.png")
    assert not overlapping(drawn[0])


@pytest.mark.parametrize(
    "rows",
    [
        [],
        slices_of(1, names=["LV"]),
        slices_of(2, phases=["ED"]),
        [{"subject": "s", "position": NAN, "phase": "ED", "class": "RV", "dice": 0.5}],
        [{"subject": "s", "position": 0.5, "phase": "ES", "class": "RV", "dice": NAN}],
    ],
)
def test_dice_by_position_of_little(rows, tmp_path, drawn):
    plots.dice_by_position(rows, tmp_path / "a.png")
    assert "0.6" in words(drawn[0])  # the other panel keeps its ticks
    assert not overlapping(drawn[0])


def rows_of(vendors: dict[str, int], names=CLASSES, phases=("ED", "ES")) -> list[dict]:
    return [
        {"subject": f"{v}{i}", "vendor": v, "phase": phase, "class": name, "dice": 0.8 + 0.1 * i / n}
        for v, n in vendors.items() for i in range(n) for phase in phases for name in names
    ]  # fmt: skip


def test_boxes_show_the_points_of_small_groups(tmp_path, drawn):
    rows = rows_of({"Siemens": 21, "Canon": 9, "GE": 1})
    plots.boxes(
        [{**row, "dice": row["dice"] - (row["phase"] == "ES") / 4} for row in rows], tmp_path / "a.png"
    )
    axis = drawn[0].axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["Canon\nn=9", "GE\nn=1", "Siemens\nn=21"]
    dots = [line.get_ydata() for line in axis.lines if line.get_markersize() == 2.2]
    assert [len(values) for values in dots] == [9, 1, 9, 1]
    medians = [line.get_ydata()[0] for line in axis.lines if line.get_linewidth() == 1.4]
    canon, ge, siemens = 0.8 + 0.1 * 4 / 9, 0.8, 0.8 + 0.1 * 10 / 21
    assert medians == pytest.approx([canon, ge, siemens, canon - 0.25, ge - 0.25, siemens - 0.25])
    boxes = sorted(axis.patches, key=lambda box: box.get_path().vertices[:-1, 0].mean())
    legend = [to_hex(patch.get_facecolor()) for patch in drawn[0].legends[0].get_patches()]
    assert [to_hex(box.get_facecolor()) for box in boxes] == legend * 3
    assert_printable(drawn[0], tmp_path / "a.png")
    assert not overlapping(drawn[0])


@pytest.mark.parametrize(
    "rows",
    [
        rows_of({"GE": 1}),
        rows_of({"GE": 2, "": 1}, phases=["ES"]),
        rows_of({f"Vendor {i} Medical": 1 + i for i in range(12)}),
        rows_of({"Siemens": 30, "Philips": 120, "GE": 50, "Canon": 50, "United Imaging": 4, "": 1}),
    ],
)
def test_boxes_of_little_and_of_much(rows, tmp_path, drawn):
    plots.boxes(rows, tmp_path / "a.png")
    assert not overlapping(drawn[0])


def test_learning_curves(tmp_path, drawn):
    scores = {
        "Baseline": {1: [0.3, 0.4, 0.5], 150: [0.9, 0.9, 0.9]},
        "mim": {1: [0.5], 10: [0.8, 0.9], 150: [0.91, 0.92, 0.93]},
    }
    plots.learning_curves(scores, tmp_path / "a.png")
    (axis,) = drawn[0].axes
    baseline, mim = axis.containers
    assert baseline.get_label() == "Baseline (seeds: 3)" and mim.get_label() == "mim (seeds: 1 to 3)"
    assert baseline[0].get_color() == "black" != mim[0].get_color()
    assert mim[0].get_ydata() == pytest.approx([0.5, 0.85, 0.92])
    spans = [
        [bar[:, 1].tolist() if len(bar) else [] for bar in line[2][0].get_segments()]
        for line in (baseline, mim)
    ]
    assert spans[0] == [pytest.approx([0.3, 0.5]), pytest.approx([0.9, 0.9])]
    # 0.8 and 0.9 spread by 0.1 / sqrt 2; one seed has no spread
    assert spans[1] == [
        [],
        pytest.approx([0.85 - 0.5**0.5 / 10, 0.85 + 0.5**0.5 / 10]),
        pytest.approx([0.91, 0.93]),
    ]
    assert axis.get_xticks().tolist() == [0, 1, 2]
    assert mim[0].get_xdata() == pytest.approx([0.075, 1.075, 2.075])
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "10", "150"]
    assert_printable(drawn[0], tmp_path / "a.png")
    assert not overlapping(drawn[0])


@pytest.mark.parametrize(
    "scores",
    [{"mim": {5: [0.5]}}, {f"method {i}": {n: [0.5, 0.6] for n in (1, 95, 100, 345)} for i in range(9)}],
)
def test_learning_curves_of_little_and_of_much(scores, tmp_path, drawn):
    plots.learning_curves(scores, tmp_path / "a.png")
    lines = [container[0] for container in drawn[0].axes[0].containers]
    assert "black" not in {line.get_color() for line in lines}
    looks = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(looks) == min(len(lines), 6)
    assert not overlapping(drawn[0])


LV = 100 + 50 * np.cos(2 * np.pi * np.arange(20) / 20)


@pytest.mark.parametrize(
    ("lv_ml", "step_s", "phases", "lines", "label"),
    [
        (LV, 0.04, {"ED": 0, "ES": 10}, [0.0, 400.0], "time (ms)"),
        (LV, None, {"ED": 0, "ES": 10}, [0, 10], "frame"),
        (LV[:1], None, {}, [], "frame"),
        (np.full(6, NAN), 0.1, {"ED": 0, "ES": 3}, [0.0, 300.0], "time (ms)"),
    ],
)
def test_volume_curve(tmp_path, drawn, lv_ml, step_s, phases, lines, label):
    volumes = {"LV": lv_ml, "RV": 1.1 * lv_ml}
    title = "a folder with a long name/" * 3 + "cine.nii.gz"
    plots.volume_curve(title, volumes, tmp_path / "a.png", step_s, phases, [])
    (axis,) = drawn[0].axes
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), lv_ml)
    assert [line.get_xdata()[0] for line in axis.lines[2:]] == pytest.approx(lines)
    assert (axis.get_xlabel(), axis.get_ylabel()) == (label, "volume (ml)") and len(axis.get_title()) == 60
    names = ["LV", "RV", *phases]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == names
    assert_printable(drawn[0], tmp_path / "a.png")
    assert not overlapping(drawn[0])


def test_excluded_frames_are_marked_in_the_volume_curve(tmp_path, drawn):
    volumes = {"LV": LV, "RV": LV + 1}
    phases = {"ED": 0, "ES": 9}
    plots.volume_curve("a", volumes, tmp_path / "a.png", 0.04, phases, [10, 19])
    marks = drawn[0].axes[0].lines[-1]
    assert marks.get_xdata() == pytest.approx([400, 760, 400, 760])
    assert marks.get_ydata() == pytest.approx([*LV[[10, 19]], *LV[[10, 19]] + 1])
    assert not overlapping(drawn[0])


def test_contour_sheet_draws_the_outline_of_each_class(write_mnms, tmp_path, monkeypatch):
    figures = []
    save = contours.save_figure
    monkeypatch.setattr(contours, "save_figure", lambda f, *a: figures.append(f) or save(f, *a))
    image = np.arange(3 * 50 * 60, dtype=np.int16).reshape(1, 3, 50, 60)
    reference, prediction = np.zeros((2, 3, 50, 60), np.uint8)
    reference[1, 10:20, 30:50] = 1
    prediction[:, 12:20, 30:50] = 1
    prediction[0, 0:5, 0:6] = 3
    affine = np.diag([-2.0, -2.0, -10.0, 1.0])  # array axes as in the store
    folder = write_mnms("A", image.T, reference[None].T, affine)
    subjects, _ = dataset.find([folder], tmp_path)
    for labels, columns in ((True, 3), (False, 3)):
        cines = store.build(subjects, tmp_path / "cache", labels=labels)
        contours.contour_sheet(cines, [(0, 0, "a $x_{$", prediction)], tmp_path / "a.png", columns=columns)
    with_reference, without = (figure.axes for figure in figures)
    blue, orange = with_reference[0].lines  # the only slice that the reference labels, half a pixel out
    assert (blue.get_color(), orange.get_color()) == (contours.BLUE, contours.ORANGE)
    for line, (top, bottom) in ((blue, (10, 20)), (orange, (12, 20))):
        assert (line.get_ydata().min(), line.get_ydata().max()) == (top - 0.5, bottom - 0.5)
        assert (line.get_xdata().min(), line.get_xdata().max()) == (29.5, 49.5)
    assert contours.around((25.0, 30.0), (2.0, 2.0)) == (slice(0, 66), slice(0, 71))
    corner = without[0].lines[1]  # closed at the border of the image
    assert (corner.get_xdata()[0], corner.get_ydata()[0]) == (corner.get_xdata()[-1], corner.get_ydata()[-1])
    assert [len(axis.lines) for axis in without] == [2, 1, 1] and not with_reference[1].axison


def test_names_that_look_like_formulas_are_drawn_as_they_are(tmp_path, drawn):
    plots.volume_curve("a $x_{$ b", {"LV": LV, "RV": LV}, tmp_path / "a.png", None, {}, [])
    row = {"subject": "a $x_{$", "vendor": "Ace $x_{$", "phase": "ED", "class": "LV", "dice": 0.5}
    plots.boxes([row], tmp_path / "b.png")
    assert drawn[0].axes[0].get_title() == "a $x_{$ b"
    assert drawn[1].axes[0].get_xticklabels()[0].get_text().startswith("Ace $x_{$")


def test_delays_follow_real_time():
    assert contours.delays_ms(4, 0.036) == [40, 30, 40, 30]  # ends at 36, 72, 108, 144 ms, in steps of 10
    assert sum(contours.delays_ms(25, 0.0333)) == 830
    assert contours.delays_ms(2, 0.004) == [20, 20]
    assert contours.delays_ms(2, None) == [40, 40]


def discs(frames: int, id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A beating LV (radius 8 to 12 px) in a wall of 15 px, the RV beside it; only class `id`, where given."""
    y, x = np.mgrid[:50, :60]
    labels = np.zeros((frames, 50, 60), np.uint8)
    for t, label in enumerate(labels):
        label[np.hypot(y - 25, x - 14) < 10] = 3
        label[np.hypot(y - 25, x - 35) < 15] = 2
        label[np.hypot(y - 25, x - 35) < 10 + 2 * np.cos(2 * np.pi * t / frames)] = 1
    images = np.array([100, 900, 300, 800], np.int16)[labels]
    return images, np.where(labels == id, labels, 0) if id else labels


def frames_of(path: Path) -> tuple[list[np.ndarray], list[int], dict]:
    with Image.open(path) as gif:
        found, delays = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            delays.append(gif.info["duration"])
            found.append(np.asarray(gif.convert("RGB")).astype(int))
        return found, delays, gif.info


def test_animation(tmp_path):
    images, labels = discs(10)
    contours.animate(images, labels, (1.0, 1.0), tmp_path / "a.gif", 0.036)
    frames, delays, info = frames_of(tmp_path / "a.gif")
    assert len(frames) == 10 and frames[0].shape == (250, 300, 3)
    assert delays == contours.delays_ms(10, 0.036) and sum(delays) == 360 and info["loop"] == 0
    lv, myo, rv = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in plots.CLASS_COLOURS.values())
    # five pixels of the picture to one of the slice; the row through the middle of both ventricles
    row = frames[0][127]
    at = {tuple(colour): np.flatnonzero((row == colour).all(axis=1)) for colour in (lv, myo, rv)}
    for colour, edges_px in ((lv, (23.5, 46.5)), (myo, (20.5, 49.5)), (rv, (4.5, 20))):
        found = at[tuple(colour)]
        assert found.min() == pytest.approx(5 * (edges_px[0] + 0.5), abs=4)
        assert found.max() == pytest.approx(5 * (edges_px[1] + 0.5), abs=4)
    assert (
        len(at[tuple(lv)]) == len(at[tuple(myo)]) // 2 == 4
    )  # two pixels at each edge; the wall has four edges
    assert (row[177] == 255).all()  # the blood, brightest of all, under no line
    assert (row[72] == 224).all()  # RV: 7/8 of the way from 100 to 900 is grey 220 of 0..251, 224 of 0..255
    # the cavity of frame 5 is smaller by 4 px on each side
    inner = np.flatnonzero((frames[5][127] == lv).all(axis=1))
    assert inner.min() - at[tuple(lv)].min() == pytest.approx(20, abs=4)


def test_animation_on_uneven_pixels(tmp_path):
    contours.animate(*discs(2), (2.0, 1.0), tmp_path / "a.gif", None)
    frames, delays, _ = frames_of(tmp_path / "a.gif")
    assert frames[0].shape == (300, 180, 3) and delays == [40, 40]  # 100 mm x 60 mm


@pytest.mark.parametrize("id", [1, 2, 3])
def test_animation_of_one_class_shows_one_colour(id, tmp_path):
    contours.animate(*discs(3, id), (1.0, 1.0), tmp_path / "a.gif", 0.05)
    for frame in frames_of(tmp_path / "a.gif")[0]:
        coloured = np.unique(frame[np.ptp(frame, axis=2) > 0], axis=0)
        assert ["#{:02X}{:02X}{:02X}".format(*c) for c in coloured] == [
            list(plots.CLASS_COLOURS.values())[id - 1]
        ]


def test_animation_of_little(tmp_path):
    path = tmp_path / "a.gif"
    contours.animate(*discs(1), (1.0, 1.0), path, 0.04)
    assert len(frames_of(path)[0]) == 1
    flat = np.full((4, 20, 20), NAN)
    contours.animate(flat, np.zeros((4, 20, 20), np.uint8), (1.0, 1.0), path, 0.04)
    frames, delays, _ = frames_of(path)
    assert sum(delays) == 160 and not frames[0].any()  # Pillow joins equal frames, and keeps their time
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]
