"""Folders of DICOM as they come from a scanner's archive or a CD: any names, any nesting, several patients.

Headers are read once and kept in an index in the cache. Nothing there or in a message names a patient: a
subject is called by its folder, or by a hash where the folder's name holds a name, an id or a birth date.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from cmrssp.data.layouts import dicom_header
from cmrssp.data.layouts.csv_table import composed
from cmrssp.data.layouts.dicom_header import Image
from cmrssp.data.layouts.dicom_series import choose
from cmrssp.data.layouts.dicom_stack import assemble
from cmrssp.data.subject import LEFT_OUT, USED, Problem, Subject, vendor_name
from cmrssp.files import atomic, hashed
from cmrssp.hardware import distributed
from cmrssp.hardware.device import available_cores

DATASET = "dicom"
_FORMAT = 6  # of the index
_MASKED = "..."
_PSEUDONYM = 10  # studies with one patient id that may be no patient's
_MANY = 4000  # headers that are worth the start of further processes


def subjects_among(files: Sequence[Path], root: Path, cache: Path) -> tuple[list[Subject], list[Problem]]:
    """The short-axis cines among `files`, one a study, and what was left out. Reads no pixels."""
    studies = defaultdict(list)
    for image in _index(files, root, cache):
        studies[image.study].append(image)
    subjects, problems = [], []
    if broken := studies.pop("", []):
        what = f"{broken[0].reason}; {len(broken)} such files"
        problems.append(Problem("", min(image.place for image in broken), what, LEFT_OUT))
    homes = {}  # {study with a cine: the folder that holds it, as parts; the first is the data folder}
    found = {study: choose(images) for study, images in studies.items()}
    for study, (scans, left) in found.items():
        home = os.path.commonpath([os.path.dirname(image.place) for image in studies[study]])
        if scans:
            homes[study] = home.split("/")
        else:
            why = "; ".join(": ".join(entry) for entry in left)
            problems.append(Problem("", home, f"a study without a short-axis cine: {why}", LEFT_OUT))
    for study, home in homes.items():
        stack = assemble(found[study][0])
        header = stack.grid[0][0]
        known = {"height_m": header.height_m, "weight_kg": header.weight_kg, "patient": header.patient}
        cine, vendor = root.joinpath(*home[1:]), vendor_name(header.vendor)
        subject = Subject(DATASET, _name(study, homes), cine, source=stack, vendor=vendor, **known)
        subjects.append(subject)
        problems += [Problem(subject.key, series, why, LEFT_OUT) for series, why in found[study][1]]
    patient, shared = Counter(s.patient for s in subjects).most_common(1)[0] if subjects else ("", 0)
    if patient and shared > 1 and 2 * shared > len(subjects):
        what = f"{shared} of {len(subjects)} studies have one patient id, and count as one patient"
        if shared >= _PSEUDONYM:
            subjects = [replace(s, patient="") if s.patient == patient else s for s in subjects]
            what = f"{shared} of {len(subjects)} studies have one patient id, which is taken for a pseudonym"
        problems.append(Problem("", root.name, f"{what}; a subjects.csv can say who is whom", USED))
    return subjects, problems


def _name(study: str, homes: dict[str, list[str]]) -> str:
    """The id of a subject: the shortest start of its path that no other study shares, else the path and a
    hash; a hash alone where the path names a patient.
    """
    home, others = homes[study], [parts for key, parts in homes.items() if key != study]
    hash = f"subject-{study[:8]}"
    size = next((k for k in range(2, len(home) + 1) if all(o[:k] != home[:k] for o in others)), 0)
    parts = home[:1] if not others else home[1:size] if size else [*home[1:], hash]
    return hash if _MASKED in parts else composed("/".join(parts))


def _index(files: Sequence[Path], root: Path, cache: Path) -> list[Image]:
    """All images, from the index where a file has not changed."""
    folder = root.resolve()
    path = Path(cache) / DATASET / f"{hashed(str(folder))}-{_FORMAT}.json"
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        known = {}
    keys = {}
    for file in (file for file in files if file.is_file()):  # no pipe, no broken link
        stat, name = file.stat(), file.relative_to(root)  # the name may be the patient's: a hash
        keys[file] = hashed(f"{name} {stat.st_size} {stat.st_mtime_ns}")
    new = [file for file, key in keys.items() if key not in known]
    workers = ProcessPoolExecutor(available_cores(), get_context("spawn")) if len(new) >= _MANY else None
    with workers or nullcontext() as pool:
        headers = pool.map(dicom_header.read, new, chunksize=200) if pool else map(dicom_header.read, new)
        bar = tqdm(headers, "DICOM headers", len(new), unit="file", disable=distributed.hide_bar())
        read = dict(zip(new, bar, strict=True))
    identity = set().union(*(words for _, words in read.values()))
    places = {file: (folder.name, *file.relative_to(root).parts) for file in read}
    masks = {part: _masked(part, identity) for part in set().union(*places.values())}
    for file, (images, _) in read.items():
        place = "/".join(masks[part] for part in places[file])
        known[keys[file]] = [[place, *image[2:]] for image in images]
    kept = {key: known[key] for key in keys.values()}
    if read:
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
