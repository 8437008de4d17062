"""From `--data PATH ...` to subjects: which layout a folder has, and the built-in phantom."""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cmrssp.data.layouts import acdc, csv_table, dicom, folder, mnms, mnms2
from cmrssp.data.subject import LEFT_OUT, Problem, Subject
from cmrssp.errors import UserError
from cmrssp.files import below

PHANTOM = "phantom"
LABEL_SUFFIX = "_gt"  # of the label files in a plain folder
_PHANTOM_VERSION = 1  # in the folder's name: the phantom of another version is written beside it


def default_cache() -> Path:
    """The user's cache folder; a temporary one if the user has no home, as in some containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmrssp"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"cmrssp-{os.getuid()}"


def find(
    paths: Sequence[str], cache: Path, label_suffix: str = LABEL_SUFFIX, *, ignore_split: bool = False
) -> tuple[list[Subject], list[Problem]]:
    """The subjects of all data sets, sorted by key, and what is odd about their files. `phantom` is the
    synthetic set, which is written below the cache on first use. A folder without a known layout is a plain
    one. DICOM studies may lie beside any layout. Opens no NIfTI image, and the headers of DICOM files.
    `ignore_split` ignores the splits in a subjects.csv.

    Raises FileNotFoundError for a missing folder or one without cines, UserError for a subject found twice.
    """
    found = [_in_folder(path, cache, label_suffix, ignore_split) for path in paths]
    subjects = sorted((s for members, _ in found for s in members), key=lambda s: s.key)
    counts = Counter(s.key for s in subjects)
    if twice := [key for key, count in counts.items() if count > 1]:
        files = ", ".join(str(s.cine) for s in subjects if s.key == twice[0])
        raise UserError(
            f"--data: subjects found more than once: {len(twice)}, the first is {twice[0]} ({files}); remove "
            "the copies or give a smaller folder (of several plain folders: the folder that holds them)"
        )
    return subjects, [problem for _, odd in found for problem in odd]


def _in_folder(
    path: str, cache: Path, label_suffix: str, ignore_split: bool
) -> tuple[list[Subject], list[Problem]]:
    root = _phantom_folder(cache) if path == PHANTOM else _expanded(path)
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        raise FileNotFoundError(f"--data {path}: {what}; give the cines' folder, or '{PHANTOM}' (synthetic)")
    files = below(root, (".nii.gz", ".nii", ".csv"), skip=cache)
    if path == PHANTOM:
        return mnms.subjects_among(files, PHANTOM)
    layouts = (mnms, mnms2, acdc)
    found = [layout.subjects_among(files) for layout in layouts]
    known = [layout for layout, (subjects, _) in zip(layouts, found, strict=True) if subjects]
    if not known:
        _refuse_frames_without_cines(path, files)
        found = [folder.subjects_among(files, root, label_suffix, ignore_split=ignore_split)]
    for file in files:
        used = not known and file == root / folder.TABLE
        if file.name.lower() == folder.TABLE and not used and not ignore_split:
            expected = f"{root / folder.TABLE}, and no file named as in M&Ms, M&Ms-2 or ACDC beside it"
            raise UserError(f"{file}: would not be read, and may say who tests; expected {expected}")
    others = set(below(root, ("",), skip=cache, any_name=True)).difference(files)
    found.append(dicom.subjects_among(sorted(others, key=str), root, cache))
    subjects = [s for subjects, _ in found for s in subjects]
    problems = [p for _, problems in found for p in problems]
    if not subjects:
        seen = "".join(f"; {problem}" for problem in found[-1][1][:3])
        expected = "expected .nii or .nii.gz files or DICOM studies in this folder or below"
        raise FileNotFoundError(f"--data {path}: no cine found; {expected}{seen}")
    return subjects, problems + _strangers(files, known)


def _refuse_frames_without_cines(path: str, files: Sequence[Path]) -> None:
    """Raise UserError for frames of M&Ms-2 or ACDC without cines: a patient's two could train and test."""
    for layout, cine in ((mnms2, "_SA_CINE.nii.gz"), (acdc, "_4d.nii.gz")):
        if parts := [f.name for f in files if layout.NAMES.fullmatch(f.name)]:
            names = f"{parts[0]} and {len(parts) - 1} more files are named as in {layout.DATASET}"
            raise UserError(f"--data {path}: {names}, but there is no cine *{cine}; add the cines")


def _strangers(files: Sequence[Path], layouts: Sequence) -> list[Problem]:
    """One problem for the NIfTI files that are not named as in the layouts found beside them."""
    names = [f.name for f in files if ".nii" in f.name.lower()]
    rest = [name for name in names if not any(layout.NAMES.fullmatch(name) for layout in layouts)]
    what = f"files that are not named as in the layouts found beside them: {csv_table.first(rest)}"
    return [Problem("", "", what, LEFT_OUT)] if rest and layouts else []


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"--data {path}: {error}") from None


def absolute(paths: Sequence[str]) -> list[str]:
    """As checkpoints store them: a later script finds them from any folder."""
    return [path if path == PHANTOM else str(_expanded(path).resolve()) for path in paths]


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


def _phantom_folder(cache: Path) -> Path:
    root = Path(cache) / f"phantom-{_PHANTOM_VERSION}"
    if not root.is_dir():
        from cmrssp.data import phantom

        print(f"writing the phantom to {root} (once, under a minute)", flush=True)
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            phantom.write(root)
        except OSError as error:
            raise UserError(f"{root}: {error.strerror}; give a writable folder as --cache") from None
    return root
