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
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from stat import S_ISREG

from cmrssp.data.layouts import dicom_header
from cmrssp.data.layouts.dicom_header import Image, hashed
from cmrssp.data.layouts.dicom_series import choose
from cmrssp.data.layouts.dicom_stack import assemble
from cmrssp.data.subject import LEFT_OUT, USED, Problem, Subject, vendor_name
from cmrssp.files import atomic
from cmrssp.hardware.device import available_cores

DATASET = "dicom"
FORMAT = 1  # of the index
_MASKED = "..."
_MANY = 4000  # headers that are worth the start of further processes


def subjects_among(files: Sequence[Path], root: Path, cache: Path) -> tuple[list[Subject], list[Problem]]:
    """The short-axis cines among `files` below `root`, one a patient and study, and what was left out. Reads
    the headers that the index does not have, and no pixels.
    """
    images, strangers = _index(files, root, cache)
    if not images:
        return [], []
    studies = defaultdict(list)
    for image in images:
        studies[image.study].append(image)
    problems = _no_study(studies.pop("", []))
    if strangers:
        what = f"files that are neither DICOM nor NIfTI nor CSV: {strangers}"
        problems.append(Problem("", "", what, LEFT_OUT))
    found = {study: choose(members) for study, members in studies.items()}
    homes = {study: _home(studies[study]) for study, (scans, _) in found.items() if scans}
    subjects = []
    for study, (scans, left) in found.items():
        if not scans:
            why = "; ".join(": ".join(entry) for entry in left)
            place = "/".join(_home(studies[study]))
            problems.append(Problem("", place, f"a study without a short-axis cine: {why}", LEFT_OUT))
            continue
        id, odd = _name(study, homes)
        stack = assemble(scans)
        header = stack.grid[0][0]
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
        problems += [Problem(subject.key, "", what, USED) for what in odd]
    return subjects, problems


def _no_study(images: Sequence[Image]) -> list[Problem]:
    """A line for each reason why files belong to no study."""
    places = defaultdict(list)
    for image in images:
        places[image.reason].append(image.place)
    return [
        Problem("", min(found), why + (f"; {len(found)} such files" if len(found) > 1 else ""), LEFT_OUT)
        for why, found in sorted(places.items())
    ]


def _home(images: Sequence[Image]) -> tuple[str, ...]:
    """The folder that holds them all, as parts; the first is the name of the data folder."""
    return tuple(os.path.commonpath([image.place.rpartition("/")[0] for image in images]).split("/"))


def _name(study: str, homes: dict[str, tuple[str, ...]]) -> tuple[str, list[str]]:
    """(id of a subject, what is odd about it): as much of its path as it shares with no other study."""
    home, others = homes[study], [parts for key, parts in homes.items() if key != study]
    hash = f"subject-{study[:8]}"
    size = next((k for k in range(2, len(home) + 1) if all(o[:k] != home[:k] for o in others)), 0)
    parts = home[:1] if not others else home[1:size] if size else (*home[1:], hash)
    if _MASKED in parts:
        return hash, ["its folder is named after the patient: called by a hash"]
    shared = others and not size
    return "/".join(parts), ["its folder holds several patients or studies"] if shared else []


def _index(files: Sequence[Path], root: Path, cache: Path) -> tuple[list[Image], int]:
    """(all images, number of files that are no DICOM), from the index where a file has not changed."""
    folder = root.resolve()
    path = Path(cache) / DATASET / f"{hashed(str(folder))}.json"
    try:
        known = json.loads(path.read_bytes())
        known = known["files"] if known["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    keys = {file: key for file in files if (key := _key(file, root))}
    new = [file for file, key in keys.items() if key not in known]
    known |= {keys[file]: [] for file in new}
    readable = [file for file in new if dicom_header.is_dicom(file)]
    read = dict(zip(readable, _headers(readable), strict=True))
    identity = set().union(*(words for _, words in read.values()))
    masks: dict[str, str] = {}
    for file, (images, _) in read.items():
        parts = (folder.name, *file.relative_to(root).parts)
        for part in parts:
            if part not in masks:
                named = _names_patient(part, identity)
                masks[part] = _MASKED if named else part.encode(errors="replace").decode()
        place = "/".join(masks[part] for part in parts)
        known[keys[file]] = [[place, *image[2:]] for image in images]
    kept = {key: known[key] for key in keys.values()}
    images = [
        Image(file, *(tuple(value) if isinstance(value, list) else value for value in row))
        for file, key in keys.items()
        for row in kept[key]
    ]
    if images and new:
        with suppress(OSError):  # then the headers are read again
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as out:
                out.write(json.dumps({"format": FORMAT, "files": kept}).encode())
    return images, sum(not rows for rows in kept.values())


def _names_patient(part: str, identity: set[str]) -> bool:
    """Whether a part of a path holds one of the words."""
    part = part.casefold()
    words = {part, *re.split(r"[\W_]+", part), re.sub(r"\D", "", part)}
    return bool(words & identity) or any(len(word) > 3 and word in part for word in identity)


def _key(file: Path, root: Path) -> str:
    """Of a file's name, size and time of change; a hash, for the name may be the patient's. "" for what is
    no file.
    """
    try:
        stat = file.stat()
    except OSError:  # a broken link
        return ""
    return S_ISREG(stat.st_mode) and hashed(f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}")


def _headers(files: Sequence[Path]) -> list[tuple[list[Image], set[str]]]:
    if len(files) >= _MANY:
        with (
            suppress(BrokenProcessPool),
            ProcessPoolExecutor(available_cores(), get_context("spawn")) as pool,
        ):
            return list(pool.map(dicom_header.read, files, chunksize=200))
    return [dicom_header.read(file) for file in files]
