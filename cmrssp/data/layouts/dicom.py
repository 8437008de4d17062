"""Folders of DICOM as they come from a scanner's archive or a CD: any names, any nesting, several patients.

Headers are read once and kept in an index in the cache. Nothing there or in a message names a patient: a
subject is called by its folder, or by a hash where the folder's name holds a name, an id or a birth date.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

from cmrssp.data.layouts import dicom_header
from cmrssp.data.layouts.dicom_header import Image, hashed
from cmrssp.data.layouts.dicom_series import choose
from cmrssp.data.layouts.dicom_stack import assemble
from cmrssp.data.subject import LEFT_OUT, USED, Problem, Subject, vendor_name
from cmrssp.files import atomic
from cmrssp.hardware.device import available_cores

DATASET = "dicom"
_FORMAT = 2  # of the index
_MASKED = "..."
_MANY = 4000  # headers that are worth the start of further processes


def subjects_among(files: Sequence[Path], root: Path, cache: Path) -> tuple[list[Subject], list[Problem]]:
    """The short-axis cines among `files` below `root`, one a patient and study, and what was left out. Reads
    the headers that the index does not have, and no pixels.
    """
    studies = defaultdict(list)
    for image in _index(files, root, cache):
        studies[image.study].append(image)
    subjects, problems = [], []
    if broken := studies.pop("", []):
        what = f"{broken[0].reason}; {len(broken)} such files"
        problems.append(Problem("", min(image.place for image in broken), what, LEFT_OUT))
    homes = {study: _home(images) for study, images in studies.items()}
    found = {study: choose(images) for study, images in studies.items()}
    with_cine = {study: homes[study] for study, (scans, _) in found.items() if scans}
    for study, (scans, left) in found.items():
        if not scans:
            why = "; ".join(": ".join(entry) for entry in left)
            what = f"a study without a short-axis cine: {why}"
            problems.append(Problem("", "/".join(homes[study]), what, LEFT_OUT))
            continue
        stack = assemble(scans)
        header = stack.grid[0][0]
        id, odd = _name(study, with_cine)
        subject = Subject(
            dataset=DATASET,
            id=id,
            cine=root.joinpath(*homes[study][1:]),
            source=stack,
            vendor=vendor_name(header.vendor),
            height_m=header.height_m,
            weight_kg=header.weight_kg,
        )
        subjects.append(subject)
        problems += [Problem(subject.key, series, why, LEFT_OUT) for series, why in left]
        problems += [Problem(subject.key, "", odd, USED)] if odd else []
    return subjects, problems


def _home(images: Sequence[Image]) -> list[str]:
    """The folder that holds them all, as parts; the first is the name of the data folder."""
    return os.path.commonpath([os.path.dirname(image.place) for image in images]).split("/")


def _name(study: str, homes: dict[str, list[str]]) -> tuple[str, str]:
    """(id of a subject, what is odd about it): as much of its path as it shares with no other study."""
    home, others = homes[study], [parts for key, parts in homes.items() if key != study]
    hash = f"subject-{study[:8]}"
    size = next((k for k in range(2, len(home) + 1) if all(o[:k] != home[:k] for o in others)), 0)
    parts = home[:1] if not others else home[1:size] if size else [*home[1:], hash]
    if _MASKED in parts:
        return hash, "its folder is named after the patient: called by a hash"
    shared = others and not size
    return "/".join(parts), "its folder holds several patients or studies" if shared else ""


def _index(files: Sequence[Path], root: Path, cache: Path) -> list[Image]:
    """All images, from the index where a file has not changed."""
    folder = root.resolve()
    path = Path(cache) / DATASET / f"{hashed(str(folder))}-{_FORMAT}.json"
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        known = {}
    keys = {file: _key(file, root) for file in files if file.is_file()}  # no pipe, no broken link
    new = [file for file, key in keys.items() if key not in known]
    read = dict(zip(new, _headers(new), strict=True))
    identity = set().union(*(words for _, words in read.values()))
    places = {file: (folder.name, *file.relative_to(root).parts) for file in new}
    masks = {part: _masked(part, identity) for part in set().union(*places.values())}
    for file, (images, _) in read.items():
        place = "/".join(masks[part] for part in places[file])
        known[keys[file]] = [[place, *image[2:]] for image in images]
    kept = {key: known[key] for key in keys.values()}
    if new:
        with suppress(OSError):  # then the headers are read again
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as out:
                out.write(json.dumps(kept).encode())
    rows = [(file, row) for file, key in keys.items() for row in kept[key]]
    return [Image(file, *(tuple(v) if isinstance(v, list) else v for v in row)) for file, row in rows]


def _masked(part: str, identity: set[str]) -> str:
    """A part of a path, unless it holds a word that names a patient."""
    lower = part.casefold()
    words = {lower, *re.split(r"[\W_]+", lower), re.sub(r"\D", "", lower)}
    named = words & identity or any(len(word) > 3 and word in lower for word in identity)
    return _MASKED if named else part.encode(errors="replace").decode()


def _key(file: Path, root: Path) -> str:
    """A hash of a file's name, which may be the patient's, size and time of change."""
    stat = file.stat()
    return hashed(f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}")


def _headers(files: Sequence[Path]) -> list[tuple[list[Image], set[str]]]:
    if len(files) < _MANY:
        return [dicom_header.read(file) for file in files]
    with ProcessPoolExecutor(available_cores(), get_context("spawn")) as pool:
        return list(pool.map(dicom_header.read, files, chunksize=200))
