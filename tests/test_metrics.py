import json
import math

import numpy as np
import pytest
from golden_metrics import GOLDEN, SPACINGS_MM, masks

from cmrssp.metrics import clinical, indexed, score, surface_distances, volumes_ml

SPACING_MM = (10.0, 1.25, 1.25)
SHAPE = (5, 12, 16)
DIAGONAL_MM = math.sqrt(50**2 + 15**2 + 20**2)
MEASURED = ("hausdorff_mm", "hd95_mm", "assd_mm")
FILLED = ("hausdorff_filled_mm", "hd95_filled_mm", "assd_filled_mm")


def block(z, y, x, shape=SHAPE):
    """A box of voxels: (first, last + 1) along each axis."""
    mask = np.zeros(shape, bool)
    mask[slice(*z), slice(*y), slice(*x)] = True
    return mask


def distances(prediction, truth, spacing_mm=SPACING_MM):
    """(hausdorff, hd95, assd), the same in both directions, with nothing missed."""
    found = surface_distances(prediction, truth, spacing_mm)
    assert found == surface_distances(truth, prediction, spacing_mm)
    assert (found["missed"], found["absent"]) == (False, False)
    assert [found[name] for name in FILLED] == [found[name] for name in MEASURED]
    return tuple(found[name] for name in MEASURED)


CUBE = block((1, 4), (4, 7), (4, 7))


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        # 26 of a cube's 27 voxels are surface. Shifted by one slice, its 9 voxels of the left-behind face are
        # 10 mm away; the middle of the opposite face lies where the other cube has its only inner voxel, 1.25
        # mm from that one's surface; the other 16 coincide. Sorted, the 95th percentile is at 0.95 * 25 =
        # 23.75, among the nine.
        (0, (10, 10, (9 * 10 + 1.25) / 26)),
        # Shifted by one row or column: 9 voxels at 1.25 mm, and again the middle of the opposite face.
        (1, (1.25, 1.25, 10 * 1.25 / 26)),
        (2, (1.25, 1.25, 10 * 1.25 / 26)),
    ],
)
def test_a_cube_shifted_by_one_voxel(axis, expected):
    assert distances(CUBE, np.roll(CUBE, 1, axis)) == pytest.approx(expected, rel=1e-12)
    assert distances(CUBE, CUBE) == (0, 0, 0)


def test_single_voxels():
    """3 slices, 4 rows and 2 columns apart: sqrt(30^2 + 5^2 + 2.5^2)."""
    expected = math.sqrt(900 + 25 + 6.25)
    one, other = block((0, 1), (3, 4), (9, 10)), block((3, 4), (7, 8), (11, 12))
    assert distances(one, other) == pytest.approx((expected,) * 3)
    assert distances(one, one) == (0, 0, 0)


def test_a_structure_that_fills_the_array_has_its_surface_at_the_border():
    """3 x 3 x 3, full, against its middle voxel: the 26 others are surface, the middle one is not."""
    full, middle = np.ones((3, 3, 3), bool), block((1, 2), (1, 2), (1, 2), (3, 3, 3))
    side, corner = math.sqrt(100 + 1.25**2), math.sqrt(100 + 2 * 1.25**2)
    ends = 10 + 4 * side + 4 * corner  # first slice, and the same of the last
    ring = 4 * 1.25 + 4 * math.sqrt(2) * 1.25
    # 26 distances to the middle, 1.25 from it. 95th percentile: at 23.75 of 0..25, among the 8 corners.
    assert distances(full, middle) == pytest.approx((corner, corner, (2 * ends + ring + 1.25) / 27))


def test_in_a_single_slice_the_surface_is_the_contour():
    """A square of 3 x 3 shifted by one row: 8 of 9 pixels are contour. From the first, its 3 pixels of the
    row that is left behind are 1.25 mm away, and the middle of its last row lies where the other has its only
    inner pixel, 1.25 mm from that one's contour; the other four coincide. In a taller stack all 9 are
    surface, and only the row that is left behind is away.
    """
    shape = (1, 8, 8)
    square = block((0, 1), (2, 5), (2, 5), shape)
    expected = (1.25, 1.25, 4 * 1.25 / 8)
    assert distances(square, np.roll(square, 1, 1)) == pytest.approx(expected)
    taller = np.pad(square, ((1, 1), (0, 0), (0, 0)))
    assert distances(taller, np.roll(taller, 1, 1))[2] == pytest.approx(3 * 1.25 / 9)


def test_one_outlier_and_how_hd95_and_assd_average():
    """Ten voxels in a row, and the same ten with a second component 3 rows away.

    From the truth: ten zeros. From the prediction: ten zeros and 3.75, whose 95th percentile is at 9.5 of
    0..10, so half of 3.75. Both pooled: at 19 of 0..20, so 0; that and 3.75 / 2 / 11 are other definitions.
    """
    row = block((2, 3), (5, 6), (0, 10))
    assert distances(row | block((2, 3), (8, 9), (0, 1)), row) == pytest.approx((3.75, 3.75 / 2, 3.75 / 21))


def test_two_components():
    """Each is measured to the nearer one of the other map: 2 columns, and 1 slice."""
    truth = block((0, 1), (2, 3), (3, 4)) | block((4, 5), (9, 10), (12, 13))
    prediction = block((0, 1), (2, 3), (5, 6)) | block((3, 4), (9, 10), (12, 13))
    # Directed: 2.5 and 10 both ways; the 95th percentile is 2.5 + 0.95 * 7.5.
    assert distances(prediction, truth) == pytest.approx((10, 9.625, 6.25))


@pytest.mark.parametrize("prediction", [True, False])
def test_a_structure_in_one_map_alone_is_missed(prediction):
    there, empty = block((1, 2), (1, 5), (1, 5)), np.zeros(SHAPE, bool)
    found = surface_distances(*((there, empty) if prediction else (empty, there)), SPACING_MM)
    assert (found["missed"], found["absent"]) == (True, False)
    assert all(math.isnan(found[name]) for name in MEASURED)
    assert [found[name] for name in FILLED] == pytest.approx([DIAGONAL_MM] * 3)


def test_a_structure_in_neither_map_is_absent():
    found = surface_distances(np.zeros(SHAPE, bool), np.zeros(SHAPE, bool), SPACING_MM)
    assert (found["missed"], found["absent"]) == (False, True)
    assert all(math.isnan(found[name]) for name in (*MEASURED, *FILLED))


def slow_distances(prediction, truth, spacing_mm):
    """Voxel by voxel and pair by pair; the percentile from its definition."""

    def surface(mask):
        points = []
        for place in np.argwhere(mask):
            for axis in range(3):
                for step in (-1, 1):
                    beside = place.copy()
                    beside[axis] += step
                    inside = 0 <= beside[axis] < mask.shape[axis] and mask[tuple(beside)]
                    if not inside:
                        points.append([n * s for n, s in zip(place, spacing_mm, strict=True)])
        return [list(point) for point in {tuple(point) for point in points}]

    def percentile(values):
        values, place = sorted(values), 0.95 * (len(values) - 1)
        low, high = values[math.floor(place)], values[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    a, b = surface(prediction), surface(truth)
    ab = [min(math.dist(p, q) for q in b) for p in a]
    ba = [min(math.dist(p, q) for q in a) for p in b]
    return max(ab + ba), max(percentile(ab), percentile(ba)), sum(ab + ba) / len(ab + ba)


@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("spacing_mm", [SPACING_MM, (3.0, 2.0, 0.7)])
def test_random_masks_equal_a_slow_loop(density, spacing_mm):
    generator = np.random.default_rng(round(100 * density))
    prediction, truth = generator.random((2, 4, 7, 9)) < density
    expected = slow_distances(prediction, truth, spacing_mm)
    assert distances(prediction, truth, spacing_mm) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("spacing_mm", SPACINGS_MM)
@pytest.mark.parametrize("name", list(masks()))
def test_distances_equal_other_libraries(name, spacing_mm):
    found = surface_distances(*masks()[name], spacing_mm)
    golden = json.loads(GOLDEN.read_text())[f"{name} {spacing_mm}"]
    for library, tolerance in (("MedPy", 1e-12), ("MONAI", 2e-6)):  # MONAI computes in float32
        for column, value in golden[library].items():
            assert found[column] == pytest.approx(value, rel=tolerance), (library, column)


def test_score_by_hand():
    """LV: 8 voxels each, 4 shared. MYO: missed. RV: in neither. A voxel is 10 * 1.25 * 1.25 = 15.625 mm3."""
    truth, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    truth[1:3, 2:4, 5:7] = 1
    prediction[1:3, 3:5, 5:7] = 1
    truth[4, 0, 0:4] = 2
    found = score(prediction, truth, SPACING_MM)
    lv = {"dice": 0.5, "volume_ml": 0.125, "reference_ml": 0.125, "volume_error_ml": 0.0}
    lv |= {"hausdorff_mm": 1.25, "hd95_mm": 1.25, "assd_mm": 0.625, "missed": False}
    myo = {"dice": 0.0, "volume_ml": 0.0, "reference_ml": 0.0625, "volume_error_ml": -0.0625}
    myo |= {"hd95_filled_mm": pytest.approx(DIAGONAL_MM), "missed": True}
    rv = {"dice": 1.0, "volume_ml": 0.0, "reference_ml": 0.0, "volume_error_ml": 0.0, "missed": False}
    for name, expected in {"LV": lv, "MYO": myo, "RV": rv}.items():
        assert {column: found[name][column] for column in expected} == expected, name
    assert math.isnan(found["MYO"]["hd95_mm"])
    assert found["RV"]["absent"]


def test_maps_of_different_shapes_are_refused():
    labels = np.zeros(SHAPE, np.uint8)
    with pytest.raises(ValueError, match=r"one shape, got \(5, 12, 16\) and \(1, 12, 16\)"):
        score(labels, labels[:1], SPACING_MM)


def test_clinical_by_hand():
    volumes = {"ED": {"LV": 150.0, "MYO": 100.0, "RV": 160.0}, "ES": {"LV": 60.0, "MYO": 110.0, "RV": 80.0}}
    left = {"lv_edv_ml": 150, "lv_esv_ml": 60, "lv_sv_ml": 90, "lv_ef_percent": 60}
    right = {"rv_edv_ml": 160, "rv_esv_ml": 80, "rv_sv_ml": 80, "rv_ef_percent": 50}
    assert clinical(volumes) == {**left, **right, "lv_mass_g": 105}


def test_clinical_with_something_missing():
    volumes = {"LV": 150.0, "MYO": 100.0, "RV": 0.0}
    only_ed = clinical({"ED": volumes})
    assert [name for name, value in only_ed.items() if value is not None] == [
        "lv_edv_ml", "rv_edv_ml", "lv_mass_g"
    ]  # fmt: skip
    only_es = clinical({"ES": volumes})
    assert [name for name, value in only_es.items() if value is not None] == ["lv_esv_ml", "rv_esv_ml"]
    both = clinical({"ED": volumes, "ES": {"LV": math.nan, "RV": 5.0}})
    assert (both["lv_esv_ml"], both["lv_sv_ml"], both["lv_ef_percent"]) == (None, None, None)
    assert (both["rv_edv_ml"], both["rv_sv_ml"], both["rv_ef_percent"]) == (0, -5, None)


def ellipsoid(semi_axes_mm, centre, spacing_mm, shape):
    at = np.indices(shape).transpose(1, 2, 3, 0) - np.array(centre)
    return ((at * spacing_mm / semi_axes_mm) ** 2).sum(axis=-1) < 1


@pytest.mark.parametrize("offset", [0.0, 0.21, 0.5])  # of a voxel, along every axis
def test_ejection_fraction_and_mass_of_ellipsoids(offset):
    """A ventricle and its wall as ellipsoids with semi-axes (c, a, b), c through the slices, pitch h.

    Summed over slices, an ellipsoid is off by -h^2 / (4 c^2) to h^2 / (8 c^2) of its volume, wherever the
    slices lie: its area is quadratic in z, so Euler-Maclaurin has one term at each tip. 0.5 % is added for
    the pixels along the outlines. To first order an EF of 59 % is then off by 0.41 times both relative
    errors, 1.6 % and 2.2 %: 1.6 points; the mass of 175 g by 1.05 g/ml times both errors, 3.7 ml and 2.0 ml:
    6 g.
    """
    spacing_mm, shape = np.array((10.0, 1.25, 1.5)), (14, 90, 90)
    centre = np.array((6.5, 44, 45)) + offset
    cavities = {"ED": np.array((48.0, 26.0, 24.0)), "ES": np.array((38.0, 19.0, 17.0))}
    outside = np.array((57.0, 36.0, 34.0))

    def volume(semi_axes_mm):
        return 4 / 3 * math.pi * float(np.prod(semi_axes_mm)) / 1000

    def filled(semi_axes_mm):
        at = (np.indices(shape).transpose(1, 2, 3, 0) - centre) * spacing_mm
        return ((at / semi_axes_mm) ** 2).sum(axis=-1) < 1

    volumes = {}
    for phase, cavity in cavities.items():
        labels = np.where(filled(cavity), 1, 2 * filled(outside)).astype(np.uint8)
        volumes[phase] = volumes_ml(labels, spacing_mm)
    numbers = clinical(volumes)
    edv, esv = (volume(cavity) for cavity in cavities.values())
    for name, true, cavity in (("lv_edv_ml", edv, cavities["ED"]), ("lv_esv_ml", esv, cavities["ES"])):
        assert numbers[name] == pytest.approx(true, rel=10**2 / (4 * cavity[0] ** 2) + 0.005)
    assert numbers["lv_ef_percent"] == pytest.approx(100 * (edv - esv) / edv, abs=1.6)
    assert numbers["lv_mass_g"] == pytest.approx(1.05 * (volume(outside) - edv), abs=6)


def test_volumes_are_indexed_to_the_body_surface_of_du_bois():
    """Du Bois and Du Bois's own table: 1.70 m and 70 kg have 1.81 square metres."""
    numbers = indexed({"lv_edv_ml": 150.0, "lv_esv_ml": None}, 1.70, 70.0)
    assert numbers["body_surface_m2"] == pytest.approx(1.81, abs=0.005)
    assert numbers["lv_edv_ml_per_m2"] == pytest.approx(150 / 1.8097, rel=1e-3)
    assert numbers["lv_esv_ml_per_m2"] is None and numbers["lv_mass_g_per_m2"] is None
    assert set(indexed({"lv_edv_ml": 150.0}, None, 70.0).values()) == {None}
