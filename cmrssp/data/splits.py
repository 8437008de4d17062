"""Who trains, who validates, who tests: by subject, from ids, vendors and pathologies alone.

A hash of (seed, subject key) orders the subjects of a stratum: every machine draws the same ones.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path

from cmrssp.data.layouts import mnms, mnms2
from cmrssp.data.layouts.csv_table import read_text
from cmrssp.data.subject import Subject, listed
from cmrssp.errors import UserError

Split = dict[str, list[str]]  # {part: subject keys}
PARTS = ("train", "validation", "test")
_TEST, _VALIDATION = 0.25, 0.20  # validation: of what the test leaves; 60 / 15 / 25 %
_MNMS_TEST_PER_VENDOR = 15
_YAML_PARTS = {"train": "train", "valid": "validation", "test": "test"}
_YAML_DATASETS = {"mm1": mnms.DATASET, "mm2": mnms2.DATASET}


def assign(
    subjects: Sequence[Subject], seed: int, *, keep_overlap: bool = False, seen: Iterable[str] = ()
) -> Split:
    """A split with sorted keys. A data set's own parts are kept (ACDC 101-150, M&Ms-2 201-360). The whole
    M&Ms gives 15 test subjects of each vendor (the paper's rule), another data set without test subjects 25
    %, stratified by vendor and pathology. 20 % of the rest validates. If any subject has labels, only such
    subjects are drawn, the others train. All subjects of a patient are in one part, if their data set does
    not say otherwise. Unless `keep_overlap`, M&Ms-2 subjects that may repeat M&Ms subjects get no part beside
    M&Ms, also if M&Ms subjects are only among the keys `seen` by a checkpoint.
    """
    if not keep_overlap:
        subjects = _without_overlap(subjects, seen)
    parts = {s.key: s.part for s in subjects}
    patients = {s.key: f"patient {s.patient}" if s.patient else s.key for s in subjects}
    _print_divided(subjects, patients)
    placed = {patients[key] for key, part in parts.items() if part}
    ordered = sorted(subjects, key=lambda s: s.key)
    labelled = [s for s in ordered if s.labels] or ordered
    one_each = {patients[s.key]: s for s in labelled if patients[s.key] not in placed}
    candidates: list[Subject] = []  # for validation
    for dataset in {s.dataset for s in subjects}:
        members = [s for s in subjects if s.dataset == dataset]
        free = [s for s in one_each.values() if s.dataset == dataset]
        drawn = [] if any(s.part == "test" for s in members) else _test(dataset, free, seed)
        parts |= {s.key: "test" for s in drawn}
        if not any(s.part == "validation" for s in members):
            candidates += [s for s in free if not parts[s.key]]
    parts |= {s.key: "validation" for s in _stratified(candidates, _VALIDATION, seed)}
    of_patient = {patients[key]: part for key, part in parts.items() if part}
    parts = {key: part or of_patient.get(patients[key], "train") for key, part in parts.items()}
    return {part: sorted(key for key in parts if parts[key] == part) for part in PARTS}


def _print_divided(subjects: Sequence[Subject], patients: dict[str, str]) -> None:
    """Print the patients whom the data set's own parts divide."""
    of_patient = defaultdict(list)
    for subject in subjects:
        if subject.part:
            of_patient[patients[subject.key]].append(subject)
    for members in of_patient.values():
        if len({subject.part for subject in members}) > 1:
            what = ", ".join(f"{subject.key} ({subject.part})" for subject in members)
            print(f"one patient in several parts, as the data set says: {what}")


def _test(dataset: str, subjects: Sequence[Subject], seed: int) -> list[Subject]:
    """The test subjects of a data set that names none itself."""
    vendors = Counter(s.vendor for s in subjects if s.vendor)  # a cell of the table can be empty
    if dataset != mnms.DATASET or len(vendors) < 4 or min(vendors.values()) <= 2 * _MNMS_TEST_PER_VENDOR:
        return _stratified(subjects, _TEST, seed)
    ranked = sorted(subjects, key=lambda s: _hash(seed, s.key))
    each = ([s for s in ranked if s.vendor == vendor] for vendor in vendors)
    return [s for of_vendor in each for s in of_vendor[:_MNMS_TEST_PER_VENDOR]]


def _without_overlap(subjects: Sequence[Subject], seen: Iterable[str]) -> Sequence[Subject]:
    """Beside M&Ms, drop M&Ms-2 subjects that may repeat it; print a note if weights have seen them. Raises
    UserError if diseases are unknown.
    """
    here, before = {s.dataset for s in subjects}, {key.split("/")[0] for key in seen}
    if mnms2.DATASET in before - here and mnms.DATASET in here - before:
        print("note: the weights were trained on M&Ms-2, some of whose subjects may be among these of M&Ms")
    if not {mnms.DATASET, mnms2.DATASET} <= here | before:
        return subjects
    diseases = {s.key: s.pathology.upper() for s in subjects if s.dataset == mnms2.DATASET}
    if unknown := list(diseases.values()).count(""):
        raise UserError(
            f"{unknown} M&Ms-2 subjects have no DISEASE in a table, and may repeat M&Ms subjects; put "
            "dataset_information.csv beside them, or say --keep-overlap"
        )
    kept = [s for s in subjects if diseases.get(s.key) not in mnms2.MAY_REPEAT_MNMS]
    if len(kept) < len(subjects):
        what = f"{len(subjects) - len(kept)} M&Ms-2 subjects with {', '.join(mnms2.MAY_REPEAT_MNMS)}"
        print(f"not used: {what}, which may repeat M&Ms subjects (--keep-overlap keeps them)")
    return kept


def _stratified(subjects: Sequence[Subject], fraction: float, seed: int) -> list[Subject]:
    """round(fraction * n) subjects (at least 1 of 2 or more), evenly spread over the strata."""
    n = len(subjects)
    count = max(round(fraction * n), min(1, n - 1))
    ranked = sorted(subjects, key=lambda s: (s.dataset, s.vendor, s.pathology, _hash(seed, s.key)))
    offset = int(_hash(seed, "offset"), 16) % max(n, 1)
    return [s for i, s in enumerate(ranked) if ((i + 1) * count + offset) // n > (i * count + offset) // n]


def _hash(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}/{key}".encode()).hexdigest()


def subset(keys: Iterable[str], num_subjects: int, seed: int) -> list[str]:
    """The first `num_subjects` of the seeded order of the keys: subsets of one seed are nested."""
    ranked = sorted(keys, key=lambda key: _hash(seed, key))
    if not 1 <= num_subjects <= len(ranked):
        labelled = f"{len(ranked)} (the labelled training subjects)"
        raise UserError(f"--n-subjects: expected 1 to {labelled}, got {num_subjects}")
    return sorted(ranked[:num_subjects])


def read(path: Path, flag: str = "--split-file") -> Split:
    """The split from a split.json or from the YAML that the paper published. Raises UserError."""
    try:
        text = read_text(path)
        lists = _published(text) if path.suffix.lower() in (".yaml", ".yml") else json.loads(text)
        split = {part: [str(key) for key in lists[part]] for part in PARTS}
        counts = Counter(chain(*split.values()))
        if twice := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"more than once: {listed(twice)}")
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        expected = f"the lists {', '.join(PARTS)} of subject keys, or the YAML of the paper"
        raise UserError(f"{flag} {path}: expected {expected} ({error!r})") from None
    return split


def _published(text: str) -> Split:
    """`test:`, below it `mm1:` and `mm2:`, below these `- id` lines, quoted or not. Raises ValueError."""
    lists: Split = {part: [] for part in PARTS}
    part = dataset = None
    for number, line in enumerate(text.splitlines(), 1):
        word = line.strip("\"' :-")
        if word in _YAML_PARTS:
            part, dataset = _YAML_PARTS[word], None
        elif word in _YAML_DATASETS:
            dataset = _YAML_DATASETS[word]
        elif line.strip().startswith("-") and word.isalnum() and part and dataset:
            lists[part].append(f"{dataset}/{word.zfill(3)}")
        elif word:
            raise ValueError(f"line {number}: {line[:60]}")
    return lists


def published_subset(split: Split) -> bool:
    """Fewer training than validation subjects: the list of one seed, as the paper's authors publish them."""
    return len(split["train"]) < len(split["validation"])


def choose(
    subjects: Sequence[Subject],
    *,
    split_file: Path | None,
    split_seed: int,
    inherited: Split | None = None,
    everyone: str | None = None,
    keep_overlap: bool = False,
    seen: Iterable[str] = (),
) -> Split:
    """The split of these subjects: all with labels in the part `everyone`, else from the file, else the
    inherited one if it names any of them, else drawn. Prints how many subjects of the split are missing, and
    how many subjects it does not name. `seen`: keys that checkpoints were trained on, for `assign`.
    """
    if everyone:
        kept = subjects if keep_overlap else _without_overlap(subjects, seen)
        kept = [s for s in kept if s.labels] or kept
        return {part: sorted(s.key for s in kept if part == everyone) for part in PARTS}
    keys = {s.key for s in subjects}
    split = (read(split_file) if split_file else inherited) or {}
    named = set(chain(*split.values()))
    if not keys & named:
        if split_file:
            expected = f"expected keys such as {min(keys)}"
            raise UserError(f"--split-file {split_file}: names none of the {len(keys)} subjects; {expected}")
        if split:
            how = f"drawn anew (--split-seed {split_seed}; evaluate.py --split all scores every subject)"
            print(f"the run's split names none of these subjects: {how}")
        return assign(subjects, split_seed, keep_overlap=keep_overlap, seen=seen)
    if missing := len(named - keys):
        print(f"not found: {missing} of the {len(named)} subjects that the split names")
    if unnamed := len(keys - named):
        how = "" if split_file else "; --split-seed 0 draws a split of all"
        print(f"not used, because the split does not name them: {unnamed} of {len(keys)} subjects{how}")
    return keep(split, keys)


def keep(split: Split, keys: Collection[str], parts: Collection[str] = PARTS) -> Split:
    """The split with only these keys in the given parts."""
    return {part: [key for key in split[part] if part not in parts or key in keys] for part in PARTS}


def describe(split: Split) -> str:
    return "subjects: " + ", ".join(f"{len(split[part])} {part}" for part in PARTS)
