"""Who trains, who validates, who tests: by subject, from ids, vendors and pathologies alone.

A hash of (seed, subject key) orders the subjects of a stratum: every machine draws the same ones.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from cmrssp.data.layouts import mnms, mnms2
from cmrssp.data.layouts.csv_table import read_text
from cmrssp.data.subject import Subject
from cmrssp.errors import UserError

Split = dict[str, list[str]]  # {part: subject keys}
PARTS = ("train", "validation", "test")
TEST_FRACTION, VALIDATION_FRACTION = 0.25, 0.20  # validation: of what the test leaves; 60 / 15 / 25 %
_MNMS_TEST_PER_VENDOR = 15


def assign(subjects: Sequence[Subject], seed: int, *, keep_overlap: bool = False) -> Split:
    """A split with sorted keys. A data set's own parts are kept (ACDC 101-150, M&Ms-2 201-360). The whole
    M&Ms gives 15 test subjects of each of its four vendors (the paper's rule). Another data set without test
    subjects gives 25 %, stratified by vendor and pathology. 20 % of the rest validates. Without
    `keep_overlap`, M&Ms-2 subjects that may repeat M&Ms subjects get no part beside M&Ms.
    """
    if not keep_overlap:
        subjects = _without_overlap(subjects)
    test: set[str] = set()
    candidates: list[Subject] = []  # for validation
    for dataset in sorted({s.dataset for s in subjects}):
        members = [s for s in subjects if s.dataset == dataset]
        free = [s for s in members if not s.part]
        vendors = Counter(s.vendor for s in free if s.vendor)  # a cell of the table can be empty
        whole_mnms = len(vendors) == 4 and min(vendors.values()) > 2 * _MNMS_TEST_PER_VENDOR
        drawn = [s for s in members if s.part == "test"]
        if not drawn and dataset == mnms.DATASET and whole_mnms:
            for vendor in vendors:
                ranked = sorted((s for s in free if s.vendor == vendor), key=lambda s: _hash(seed, s.key))
                drawn += ranked[:_MNMS_TEST_PER_VENDOR]
        elif not drawn:
            drawn = _stratified(free, TEST_FRACTION, seed)
        test |= {s.key for s in drawn}
        if not any(s.part == "validation" for s in members):
            candidates += free
    candidates = [s for s in candidates if s.key not in test]
    validation = {s.key for s in _stratified(candidates, VALIDATION_FRACTION, seed)}
    validation |= {s.key for s in subjects if s.part == "validation"}
    train = {s.key for s in subjects} - test - validation
    return {"train": sorted(train), "validation": sorted(validation), "test": sorted(test)}


def _without_overlap(subjects: Sequence[Subject]) -> list[Subject]:
    """Beside M&Ms, drop M&Ms-2 subjects that may repeat it. Raises UserError if diseases are unknown."""
    theirs = [s for s in subjects if s.dataset == mnms2.DATASET]
    if not theirs or all(s.dataset != mnms.DATASET for s in subjects):
        return list(subjects)
    if unknown := sum(not s.pathology for s in theirs):
        raise UserError(
            f"{unknown} M&Ms-2 subjects have no DISEASE in a table, and may repeat M&Ms subjects; put "
            "dataset_information.csv beside them, or say --keep-overlap"
        )
    repeated = {s.key for s in theirs if s.pathology.upper() in mnms2.MAY_REPEAT_MNMS}
    if repeated:
        what = f"{len(repeated)} M&Ms-2 subjects with {', '.join(mnms2.MAY_REPEAT_MNMS)}"
        print(f"not used: {what}, which may repeat M&Ms subjects (--keep-overlap keeps them)")
    return [s for s in subjects if s.key not in repeated]


def subset(keys: Iterable[str], num_subjects: int, seed: int) -> list[str]:
    """The first `num_subjects` of the seeded order of the keys: subsets of one seed are nested."""
    keys = sorted(keys)
    if not 1 <= num_subjects <= len(keys):
        labelled = f"{len(keys)} (the labelled training subjects)"
        raise UserError(f"--n-subjects: expected 1 to {labelled}, got {num_subjects}")
    return sorted(sorted(keys, key=lambda key: _hash(seed, key))[:num_subjects])


def read(path: Path) -> Split:
    """The split from a split.json or from the YAML that the paper published. Raises UserError."""
    try:
        text = read_text(Path(path))
    except OSError as error:
        raise UserError(f"--split-file {path}: {error.strerror}") from None
    if Path(path).suffix.lower() in (".yaml", ".yml"):
        lists = _published(path, text)
    else:
        try:
            split = json.loads(text)
            if not all(isinstance(split[part], list) for part in PARTS):
                raise TypeError("expected lists")
            lists = {part: list(map(str, split[part])) for part in PARTS}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            parts = ", ".join(PARTS)
            raise UserError(
                f"{path}: expected JSON with the lists {parts} of subject keys ({error!r})"
            ) from None
    counts = Counter(key for keys in lists.values() for key in keys)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise UserError(f"{path}: expected every subject once, got {', '.join(twice[:5])} more than once")
    return lists


_YAML_PARTS = {"train": "train", "valid": "validation", "test": "test"}
_YAML_DATASETS = {"mm1": mnms.DATASET, "mm2": mnms2.DATASET}


def _published(path: Path, text: str) -> Split:
    """`test:`, below it `mm1:` and `mm2:`, below these `- id` lines or a list in brackets, quoted or not."""
    lists: Split = {part: [] for part in PARTS}
    part = dataset = None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        words = re.fullmatch(r"(?:(\w+):)?\s*(?:- *(\w+)|\[([\w ,]*)\])?", re.sub("[\"']", "", line).strip())
        key, ids = words and words[1], words and (words[2] or words[3] or "").replace(",", " ").split()
        if key in _YAML_PARTS and not ids:
            part, dataset = _YAML_PARTS[key], None
        elif words and part and (key in _YAML_DATASETS if key else dataset or not ids):
            dataset = _YAML_DATASETS.get(key, dataset)
            lists[part] += [f"{dataset}/{id.zfill(3) if dataset == mnms2.DATASET else id}" for id in ids]
        elif line:
            expected = f"{', '.join(_YAML_PARTS)}, below them {' and '.join(_YAML_DATASETS)}, below these ids"
            raise UserError(f"{path}, line {number}: expected {expected}; got {line[:60]!r}")
    return lists


def _hash(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}/{key}".encode()).hexdigest()


def _stratified(subjects: Sequence[Subject], fraction: float, seed: int) -> list[Subject]:
    """round(fraction * n) subjects (at least 1 of 2 or more), evenly spread over the strata."""
    n = len(subjects)
    count = max(round(fraction * n), min(1, n - 1)) if n else 0
    ranked = sorted(subjects, key=lambda s: (s.dataset, s.vendor, s.pathology, _hash(seed, s.key)))
    offset = int(_hash(seed, "offset"), 16) % max(n, 1)
    return [s for i, s in enumerate(ranked) if ((i + 1) * count + offset) // n > (i * count + offset) // n]


def published_subset(split: Split) -> bool:
    """Fewer training than validation subjects: the list of one seed, as the paper's authors publish them."""
    return len(split["train"]) < len(split["validation"])


def choose(
    subjects: Sequence[Subject],
    *,
    split_file: Path | None,
    split_seed: int,
    inherited: Split | None = None,
    keep_overlap: bool = False,
) -> Split:
    """The split of these subjects: from the file, else the inherited one if it names any of them, else drawn.
    Prints how many subjects of the split are missing, and how many subjects it does not name.
    """
    keys = {s.key for s in subjects}
    split = read(split_file) if split_file is not None else inherited
    listed = {key for part in PARTS for key in split[part]} if split else set()
    if not keys & listed:
        if split_file is not None:
            names = f"names none of the {len(keys)} subjects found; expected keys such as {min(keys)}"
            raise UserError(f"--split-file {split_file}: {names}")
        if split:
            print(f"the run's split names none of these subjects: drawn anew (--split-seed {split_seed})")
        return assign(subjects, split_seed, keep_overlap=keep_overlap)
    if missing := len(listed - keys):
        print(f"not found: {missing} of the {len(listed)} subjects that the split names")
    if unnamed := len(keys - listed):
        print(f"not used, because the split does not name them: {unnamed} of {len(keys)} subjects")
    return keep(split, keys)


def keep(split: Split, keys: Iterable[str], parts: Sequence[str] = PARTS) -> Split:
    """The split with only these keys in the given parts."""
    keys = set(keys)
    return {part: [key for key in split[part] if part not in parts or key in keys] for part in PARTS}


def named(subjects: Sequence[Subject], split: Split, parts: Sequence[str] = PARTS) -> list[Subject]:
    """The subjects that are in these parts of the split."""
    keys = {key for part in parts for key in split[part]}
    return [s for s in subjects if s.key in keys]


def describe(split: Split) -> str:
    return "subjects: " + ", ".join(f"{len(split[part])} {part}" for part in PARTS)
