"""From `--data PATH ...` to subjects: which layout a folder has, and the built-in phantom."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cmrssp.data.layouts import acdc, dicom, folder, mnms, mnms2
from cmrssp.data.subject import LEFT_OUT, Problem, Subject
from cmrssp.errors import UserError
from cmrssp.files import below

PHANTOM = "phantom"
LABEL_SUFFIX = "_gt"  # of the label files in a plain folder
# part of the folder's name: a phantom of an older version is not taken for the present one
_PHANTOM_VERSION = 1


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmrssp"


def find(
    paths: Sequence[str], cache: Path, label_suffix: str = LABEL_SUFFIX
) -> tuple[list[Subject], list[Problem]]:
    """The subjects of all data sets, sorted by key, and what is odd about their files. `phantom` stands for
    the built-in synthetic set, which is written below the cache on first use; a folder without a known layout
    is taken as a plain one. DICOM studies may lie beside any layout. Opens no NIfTI image, of DICOM files the
    headers.

    Raises FileNotFoundError for a missing folder or one without cines, UserError for a subject found twice.
    """
    subjects: list[Subject] = []
    problems: list[Problem] = []
    for path in paths:
        root = _phantom_folder(cache) if path == PHANTOM else Path(path).expanduser()
        if not root.is_dir():
            what = "not a folder" if root.exists() else "no such folder"
            raise FileNotFoundError(
                f"--data {path}: {what}; give the folder that holds the cines, or '{PHANTOM}' for the "
                "synthetic set"
            )
        files = below(root, (".nii.gz", ".nii", ".csv"), skip=cache)
        read = None  # the subjects.csv that counts
        if path == PHANTOM:
            layouts = [mnms.find(files, PHANTOM)]
        else:
            layouts = [layout.find(files) for layout in (mnms, mnms2, acdc)]
            if not any(found for found, _ in layouts):
                for layout, what in ((mnms2, "_SA_CINE.nii.gz"), (acdc, "_4d.nii.gz")):
                    parts = [f.name for f in files if layout.NAMES.fullmatch(f.name)]
                    if parts:
                        raise UserError(
                            f"--data {path}: {parts[0]} and {len(parts) - 1} more files are named as in "
                            f"{layout.DATASET}, but there is no cine *{what}; as a plain folder every frame "
                            "would be a subject of its own"
                        )
                layouts = [folder.find(files, root, label_suffix)]
                read = root / folder.TABLE
            for file in files:
                if file.name.lower() == folder.TABLE and file != read:
                    raise UserError(
                        f"{file}: would not be read, and may say who tests; expected "
                        f"{root / folder.TABLE}, and no file named as in M&Ms, M&Ms-2 or ACDC beside it"
                    )
            rest = set(below(root, ("",), skip=cache, any_name=True)).difference(files)
            layouts.append(dicom.find(sorted(rest, key=str), root, cache))
        if not any(found for found, _ in layouts):
            seen = "".join(f"; {problem}" for problem in layouts[-1][1][:3])
            raise FileNotFoundError(
                f"--data {path}: no cine found; expected .nii or .nii.gz files or DICOM studies in this "
                f"folder or below{seen}"
            )
        for found, odd in layouts:
            subjects += found
            problems += odd
        problems += _strangers(files, {s.dataset for found, _ in layouts for s in found})
    counts = Counter(s.key for s in subjects)
    twice = sorted(key for key, count in counts.items() if count > 1)
    if twice:
        files = ", ".join(str(s.cine) for s in subjects if s.key == twice[0])
        raise UserError(
            f"--data: {len(twice)} subjects are found more than once, the first is {twice[0]} ({files}); "
            "remove the copies or give a smaller folder (several plain folders: give the folder that holds "
            "them)"
        )
    return sorted(subjects, key=lambda s: s.key), problems


def _strangers(files: Sequence[Path], datasets: set[str]) -> list[Problem]:
    """One line on NIfTI files that are not named as in the layouts which were found beside them."""
    patterns = [layout.NAMES for layout in (mnms, mnms2, acdc) if layout.DATASET in datasets]
    names = [f.name for f in files if ".nii" in f.name.lower()]
    rest = [name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)]
    if not rest or not patterns:
        return []
    more = f", ... ({len(rest)} in all)" if len(rest) > 8 else ""
    what = f"files that are not named as in the layouts found beside them: {', '.join(rest[:8])}{more}"
    return [Problem("", "", what, LEFT_OUT)]


def absolute(paths: Sequence[str]) -> list[str]:
    """As a checkpoint remembers them, so that a later script finds them from any folder."""
    return [path if path == PHANTOM else str(Path(path).expanduser().resolve()) for path in paths]


def source(given: dict) -> tuple[list[str], str]:
    """(data, label suffix) that flags or a checkpoint's provenance name, else the defaults."""
    return given.get("data", [PHANTOM]), given.get("label_suffix", LABEL_SUFFIX)


def announce(paths: Sequence[str]) -> None:
    note = ""
    if PHANTOM in paths:
        note = " (synthetic: good for a first try, not for results; point --data at a folder of real cines)"
    print(f"data: {' '.join(paths)}{note}", flush=True)


def name(paths: Sequence[str]) -> str:
    """For the name of a run folder."""
    names = [Path(path).resolve().name for path in paths]
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(names)) or "data"


def _phantom_folder(cache: Path) -> Path:
    folder = Path(cache) / f"phantom-{_PHANTOM_VERSION}"
    if not folder.is_dir():
        from cmrssp.data import phantom

        print(f"writing the phantom to {folder} (once, under a minute)", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        phantom.write(folder)
    return folder
