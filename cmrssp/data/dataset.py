"""From `--data PATH ...` to subjects: which layout a folder has, and the built-in phantom."""

import os
import re
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from cmrssp.data import phantom
from cmrssp.data.layouts import acdc, dicom, folder, mnms, mnms2
from cmrssp.data.subject import LEFT_OUT, Problem, Subject, listed
from cmrssp.errors import UserError
from cmrssp.files import below, check_writable, json_object

PHANTOM = "phantom"
LABEL_SUFFIX = "_gt"  # of the label files in a plain folder
PREDICTED = "_labels.nii.gz"  # a network's label map is named like its cine, with this behind
PREDICTIONS = "predictions.json"  # beside the label maps of evaluate.py --predict
_NETWORKS = {PREDICTIONS: "networks", "../summary.json": "checkpoints"}  # of --predict, --save-predictions
_PHANTOM_VERSION = 3  # in the folder's name: the phantom of another version is written beside it


def default_cache() -> Path:
    """The user's cache folder; a temporary one if the user has no home, as in some containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmrssp"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"cmrssp-{os.getuid()}"


def find(
    paths: Sequence[str], cache: Path, label_suffix: str = LABEL_SUFFIX, *, ignore_split: bool = False
) -> tuple[list[Subject], list[Problem]]:
    """The subjects of all data sets, sorted by key, and what is odd about their files. Opens no
    image: tables, small JSON and the headers of DICOM files alone. `ignore_split`: without the splits of a
    subjects.csv. Raises FileNotFoundError for a missing folder or one without cines, UserError for a subject
    found twice.
    """
    found = [_in_folder(path, cache, label_suffix, ignore_split) for path in paths]
    subjects = sorted((s for members, _ in found for s in members), key=lambda s: s.key)
    for one, other in pairwise(subjects):
        if one.key == other.key:
            raise UserError(
                f"--data: {one.key} was found more than once ({one.cine}, {other.cine}); remove the copies "
                "or give a smaller folder (of several plain folders: the folder that holds them)"
            )
    return subjects, [problem for _, odd in found for problem in odd]


def _in_folder(
    path: str, cache: Path, label_suffix: str, ignore_split: bool
) -> tuple[list[Subject], list[Problem]]:
    suffixes = (".nii.gz", ".nii", ".csv")
    if path == PHANTOM:
        root = Path(cache) / f"phantom-{_PHANTOM_VERSION}"
        if not root.is_dir():
            check_writable("--cache", root)
            print(f"writing the phantom to {root} (once, under a minute)", flush=True)
            phantom.write(root)
        return mnms.subjects_among(below(root, suffixes), PHANTOM)
    root = Path(os.path.expanduser(path))
    if not root.is_dir():
        raise FileNotFoundError(f"--data {path}: no such folder; give the cines' folder, or '{PHANTOM}'")
    files = below(root, suffixes, skip=cache)
    holding = {f.parent for f in files if f.name.endswith(PREDICTED)}
    predicted = {place for place in holding if _of_a_network(place)}
    files = [f for f in files if not (f.parent in predicted and f.name.endswith(PREDICTED))]
    found = {layout: layout.subjects_among(files) for layout in (mnms, mnms2, acdc)}
    known = [layout for layout, (subjects, _) in found.items() if subjects]
    if not known:
        if frames := found[mnms2][1] + found[acdc][1]:
            # as plain cines two of a patient could train and test
            raise UserError(f"--data {path}: {frames[0]}; add the cines of these frames")
        found = {folder: folder.subjects_among(files, root, label_suffix)}
    own_table = root / folder.TABLE
    for file in () if ignore_split else files:
        if file.name.lower() == folder.TABLE and (known or file != own_table):
            expected = f"{own_table}, and no file named as in M&Ms, M&Ms-2 or ACDC beside it"
            raise UserError(f"{file}: would not be read, and may say who tests; expected {expected}")
    others = set(below(root, ("",), skip=cache, any_name=True)).difference(files)
    found[dicom] = dicom.subjects_among(sorted(others), root, cache)
    subjects = [s for members, _ in found.values() for s in members]
    problems = [p for _, odd in found.values() for p in odd]
    what = "label maps that a network predicted"
    where = sorted(str(place.relative_to(root)) for place in predicted)
    problems += [Problem("", place, what, LEFT_OUT) for place in where]
    if not known:
        subjects, odd = folder.with_table(subjects, root, ignore_split=ignore_split)
        problems += odd
    if not subjects:
        expected = "expected .nii or .nii.gz files or DICOM studies in this folder or below"
        seen = "".join(f"; {problem}" for problem in problems[:3])
        raise FileNotFoundError(f"--data {path}: no cine found; {expected}{seen}")
    names = [f.name for f in files if known and f.suffix.lower() != ".csv"]
    if strangers := [name for name in names if not any(k.NAMES.fullmatch(name) for k in known)]:
        what = f"files that are not named as in the layouts found beside them: {listed(strangers)}"
        problems.append(Problem("", "", what, LEFT_OUT))
    return subjects, problems


def _of_a_network(folder: Path) -> bool:
    """Whether a network of ours predicted the folder's label maps."""
    return any(key in json_object(folder / name) for name, key in _NETWORKS.items())


def absolute(paths: Sequence[str]) -> list[str]:
    """As checkpoints store them: a later script finds them from any folder."""
    return [path if path == PHANTOM else str(Path(os.path.expanduser(path)).resolve()) for path in paths]


def source(given: dict) -> tuple[list[str], str]:
    """(data, label suffix) of flags or of a checkpoint's provenance, else the defaults."""
    return given.get("data", [PHANTOM]), given.get("label_suffix", LABEL_SUFFIX)


def announce(paths: Sequence[str]) -> None:
    """Print which data are used."""
    note = " (synthetic: good for a first try, not for results; point --data at a folder of real cines)"
    print(f"data: {' '.join(paths)}{note if PHANTOM in paths else ''}", flush=True)


def name(paths: Sequence[str]) -> str:
    """For the name of a run folder."""
    names = [Path(path).resolve().name for path in paths]
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(names)) or "data"
