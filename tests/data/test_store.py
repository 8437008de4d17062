import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cmrssp.data import dataset, phantom, store
from cmrssp.data.batches import Batches, Slices, collate
from cmrssp.data.cine import read_cine
from cmrssp.data.motion import motion_map, temporal_deviation
from cmrssp.data.subject import BrokenSubject


@pytest.fixture
def three(write_mnms, beating, tmp_path):
    """Three subjects, B without labels; 40 x 32 pixels, 3 slices, 3 frames."""
    for i, id in enumerate("ABC"):
        cine, labels = beating(i)
        folder = write_mnms(id, cine, None if id == "B" else labels)
    return dataset.find([folder], tmp_path)[0]


def built(path):
    return {p.name: p.stat().st_mtime_ns for p in (path / "store").iterdir()}


def test_slices_are_those_of_the_files(three, tmp_path):
    cines = store.build(three, tmp_path / "cache", labels=True)
    for i, subject in enumerate(three):
        stored = read_cine(subject).stored
        for t, z in np.ndindex(3, 3):
            assert (cines.slice(i, t, z) == stored[t, z]).all()
        assert (cines.volume(i, 2) == stored[2]).all()
    assert [record.frames for record in cines.labels] == [(0, 2), (), (0, 2)]
    assert (cines.label_slice(2, 2, 1) == cines.label_volume(2, 2)[1]).all()
    assert (cines.label_volume(2, 2) == 1).sum() == 3 * (np.hypot(*np.mgrid[-22:18, -14:18]) < 8).sum()
    assert cines.labels[0].phases == {"ED": 2, "ES": 0} and cines.labels[1].phases == {}


def test_a_batch_holds_the_motion_maps_of_its_slices(three, tmp_path):
    cines = store.build(three, tmp_path / "cache", labels=False)
    batch = collate(cines, [(0, 2, 0), (0, 1, 0), (2, 0, 2)], labelled=False, motion=True)
    maps = [motion_map(temporal_deviation(read_cine(s).stored), (1.5, 1.5)) for s in three]
    assert batch["motion"].dtype == torch.float16 and batch["motion"].shape == batch["image"].shape
    for found, expected in zip(batch["motion"], (maps[0][0], maps[0][0], maps[2][2]), strict=True):
        assert expected.any() and (found[0, :32, :40].numpy() == expected).all()
    assert not batch["motion"][:, :, 32:].any() and not batch["motion"][:, :, :, 40:].any()


def test_a_built_store_is_not_built_again_and_a_changed_source_is(three, tmp_path, beating, write_mnms):
    cache = tmp_path / "cache"
    store.build(three, cache, labels=True)
    first = built(cache)
    store.build(three, cache, labels=True)
    assert built(cache) == first
    write_mnms("A", *beating(9))
    cines = store.build(three, cache, labels=True)
    now = built(cache)
    assert first.items() <= now.items()  # a training that reads the old ones is not disturbed
    assert {name[0] for name in now.keys() - first} == {"A"} and len(now) == 8
    assert (cines.volume(0, 0) == read_cine(three[0]).stored[0]).all()


def test_what_killed_processes_left_is_swept_after_a_day(three, tmp_path):
    (tmp_path / "cache" / "store").mkdir(parents=True)
    old, new = (tmp_path / "cache" / "store" / f".{name}.cine.12.tmp" for name in "ab")
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    store.build(three, tmp_path / "cache", labels=False)
    assert not old.exists() and new.exists()


def test_two_that_write_the_phantom_at_once_both_end_well(tmp_path):
    def write(_) -> None:
        phantom.write(tmp_path / "hearts", num_subjects=2, num_frames=2, max_slices=2, max_matrix=64)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["hearts"]
    assert len(list((tmp_path / "hearts").rglob("*_sa.nii.gz"))) == 2


def test_images_alone_open_no_label_file(three, tmp_path):
    """A label file that cannot be read disturbs nobody who asks for no labels."""
    three[0].labels[0].path.write_bytes(b"nonsense")
    cines = store.build(three, tmp_path / "cache", labels=False)
    assert cines.labels is None and all(name.endswith(".cine") for name in built(tmp_path / "cache"))


def test_all_broken_subjects_are_named_at_once(three, tmp_path, capsys):
    for subject in three[:2]:
        subject.cine.write_bytes(subject.cine.read_bytes()[:300])
    with pytest.raises(
        BrokenSubject, match=r"2 of 3 subjects cannot be used(.|\n)*mnms/A: .*truncated(.|\n)*mnms/B: "
    ):
        store.build(three, tmp_path / "cache", labels=False)
    cines = store.build(three, tmp_path / "cache", labels=False, skip_broken=True)
    assert [s.id for s in cines.subjects] == ["C"]
    assert "left out" in capsys.readouterr().out


def test_a_batch_holds_native_slices_padded(three, tmp_path):
    cines = store.build(three, tmp_path / "cache", labels=True)
    batch = collate(cines, [(0, 2, 0), (2, 0, 2)], labelled=True)
    assert batch["image"].shape == batch["label"].shape == (2, 1, 64, 64)
    assert batch["image"].dtype == torch.int16 and batch["label"].dtype == torch.uint8
    assert (batch["image"][1, 0, :32, :40].numpy() == cines.slice(2, 0, 2)).all()
    assert not batch["image"][:, :, 32:].any() and not batch["image"][:, :, :, 40:].any()
    assert batch["position"].tolist() == pytest.approx([0.0, 2 / 3])
    assert batch["size"].tolist() == [[32, 40], [32, 40]] and batch["spacing_mm"].tolist() == [[1.5, 1.5]] * 2
    assert (batch["subject"].tolist(), batch["frame"].tolist()) == ([0, 2], [2, 0])
    assert batch["mean"][0].item() == pytest.approx(read_cine(three[0]).stored.mean(), rel=1e-6)


def test_position_of_a_single_slice_is_nan(write_mnms, beating, tmp_path):
    folder = write_mnms("S", beating()[0][:, :, :1])
    cines = store.build(dataset.find([folder], tmp_path)[0], tmp_path / "cache", labels=False)
    assert torch.isnan(collate(cines, [(0, 0, 0)], labelled=False)["position"]).all()


@pytest.fixture
def batches_of_four(three, tmp_path):
    """The batches of all 27 slices of three subjects."""
    cines = store.build(three, tmp_path / "cache", labels=True)
    slices = Slices(cines, [s.key for s in three])
    return Batches(cines, slices, batch_size=4, seed=1, labelled=False, device=torch.device("cpu"))


def test_slices_are_numbered_without_a_gap(batches_of_four):
    slices = batches_of_four.slices
    assert len(slices) == 27
    assert {slices.locate(i) for i in range(27)} == {tuple(place) for place in np.ndindex(3, 3, 3)}


def test_slices_of_labelled_frames_alone(three, tmp_path):
    """Two of three subjects have labels, in two of three frames of three slices."""
    cines = store.build(three, tmp_path / "cache", labels=True)
    assert len(Slices(cines, [s.key for s in three], phases="both")) == 2 * 2 * 3
    assert len(Slices(cines, [s.key for s in three], phases="ed")) == 2 * 3


def test_an_epoch_visits_every_slice_at_most_once(batches_of_four):
    def places(epoch):
        return [
            (s, f, round(p * 3))
            for b in batches_of_four.epochs(epoch, epoch + 1)
            for s, f, p in zip(
                b["subject"].tolist(), b["frame"].tolist(), b["position"].tolist(), strict=True
            )
        ]

    assert len(batches_of_four) == 6 and len(set(places(0))) == len(places(0)) == 24
    assert places(0) == places(0) and places(0) != places(1)


def test_slices_in_order_are_all_or_a_sample_that_stays(batches_of_four):
    assert sum(len(b["image"]) for b in batches_of_four.in_order()) == 27
    assert [len(b["image"]) for b in batches_of_four.in_order(6)] == [4, 2]
    some = [torch.cat([b["position"] for b in batches_of_four.in_order(9)]).tolist() for _ in range(2)]
    assert some[0] == some[1] and len(set(some[0])) == 3  # every third would be the first of each stack


def test_a_batch_larger_than_the_data_is_the_only_one(three, tmp_path):
    cines = store.build(three, tmp_path / "cache", labels=False)
    loader = Batches(
        cines, Slices(cines, ["mnms/A"]), batch_size=64, seed=0, labelled=False, device=torch.device("cpu")
    )
    assert len(loader) == 1 and [len(b["image"]) for b in loader.epochs(0, 1)] == [9]


def test_the_reader_hands_its_errors_over_and_ends_with_the_consumer(three, tmp_path):
    cines = store.build(three, tmp_path / "cache", labels=False)
    loader = Batches(
        cines, Slices(cines, ["mnms/A"]), batch_size=1, seed=0, labelled=False, device=torch.device("cpu")
    )
    for _ in loader.epochs(0, 1):
        break  # leaves early
    assert not [t for t in threading.enumerate() if t.name.startswith("slice reader")]
    os.remove(cines.cines[0].path)
    with pytest.raises(FileNotFoundError):
        list(loader.epochs(0, 1))
