"""Damaged cines: one of two cines is damaged at a time, and both are predicted."""

import contextlib
import csv
import gzip
import io
import random
import re
import resource
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from itertools import count
from pathlib import Path
from typing import BinaryIO
from unittest import mock

import nibabel
import numpy as np
from fuzz import damaged
from matplotlib.figure import Figure

import evaluate
from cmrssp.errors import UserError

_SIZES = ("lv_edv_ml", "lv_esv_ml", "rv_edv_ml", "lv_mass_g")


_numbers, _save = count(), Figure.savefig


def save_one_in_ten(figure: Figure, file: BinaryIO, **options) -> None:
    """Encoding a PNG takes half of the time of a campaign."""
    if next(_numbers) % 10 == 0:
        _save(figure, file, **options)


def write(path: Path, seed: int, frames: int) -> None:
    """A beating disc in a ring: 40 x 36 pixels of 3 mm, 4 slices of 10 mm, frames of 0.15 s."""
    draw = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(40), np.arange(36), indexing="ij")
    array = draw.integers(0, 60, (40, 36, 4, frames)).astype(np.int16)
    for t in range(frames):
        distance = np.hypot(x - 20, y - 18)
        array[distance < 9 + 2 * np.cos(2 * np.pi * t / frames), :, t] += 300
        array[distance > 14, :, t] += (np.arange(4) * 20).astype(np.int16)
    affine = np.diag([3.0, 3.0, 10.0, 1.0])
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_zooms((3.0, 3.0, 10.0, 0.15))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)


def predict(folder: Path, checkpoint: str) -> tuple[int, dict[str, dict]]:
    """(exit status, rows of clinical.csv) of a prediction; asserts that it leaves only what it should."""
    out, said = folder.with_name("out"), io.StringIO()
    shutil.rmtree(out, ignore_errors=True)
    words = ["--predict", str(folder), "--checkpoint", checkpoint, "--out", str(out)]
    words += ["--cache", str(folder.with_name("cache"))]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = evaluate.main(words)
        except UserError as error:
            assert len(str(error).splitlines()) == 1, error
            status = 2
    names = {path.name for path in out.iterdir()}
    rows = {row["cine"]: row for row in csv.DictReader((out / "clinical.csv").open())}
    ends = ("_labels.nii.gz", "_contours.png", "_volumes.png", ".gif")
    assert names <= {"clinical.csv", "predictions.json", *(cine + end for cine in rows for end in ends)}, (
        names
    )
    assert not folder.with_name("cache").exists()
    return status, rows


def same_sizes(row: dict, sound: dict) -> bool:
    return all(
        row[n] == sound[n] or abs(float(row[n] or 0) - float(sound[n])) < 0.02 * float(sound[n])
        for n in _SIZES
    )


def campaign(seed: int, mutations: int, checkpoint: str) -> dict:
    """What came of so many damages. Fails where the prediction does or warns, where the other cine's result
    changes, or where something is left behind.
    """
    results: Counter = Counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(Figure, "savefig", save_one_in_ten),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", RuntimeWarning)
        data = Path(folder) / "data"
        data.mkdir()
        write(data / "a.nii.gz", 0, frames=6)
        write(data / "b.nii", 1, frames=1)
        status, sound = predict(data, checkpoint)
        assert status == 0 and set(sound) == {"a", "b"}, sound
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(mutations):
            draw = random.Random(f"{seed}/{number}")
            path = draw.choice(sorted(data.iterdir()))
            whole = path.read_bytes()
            kind, content = damaged(draw, path, whole)
            path.write_bytes(content)
            try:
                status, rows = predict(data, checkpoint)
                hurt = path.name.partition(".")[0]
                (other,) = {"a", "b"} - {hurt}
                assert rows[other] == sound[other], (rows[other], sound[other])
                row = rows[hurt]
                assert status == (2 if row["error"] else 0), (status, row)
                if row["error"]:
                    assert not re.match(r"\w+(Error|Exception): ", row["error"]), row["error"]  # not foreseen
                    results["a row that says why"] += 1
                elif row["flags"] != sound[hurt]["flags"]:
                    results["flagged"] += 1
                elif same_sizes(row, sound[hurt]):
                    results["right"] += 1
                else:
                    results[_explained(whole, content, path)] += 1
            except BaseException:
                print(f"seed {seed}, mutation {number}: {kind} of {path.name}", file=sys.stderr)
                raise
            finally:
                path.write_bytes(whole)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return {"results": results, "grown_mb": grown}


def _explained(whole: bytes, content: bytes, path: Path) -> str:
    """Other sizes without another flag: the header or the voxels must be other ones, and plausible."""
    if path.suffix == ".gz":
        whole, content = gzip.decompress(whole), gzip.decompress(content)
    assert whole[:348] != content[:348] or whole[352:] != content[352:], "the same file, other numbers"
    return "another valid cine"
