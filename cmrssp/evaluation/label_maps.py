"""Label maps that `evaluate.py --predict` wrote, as labels for self-training; predictions.json beside them
holds what is known of them. A map is found by the images that it was made from, whatever their names.

The online form was not better: a mean teacher (momentum 0.99, confidence 0.95, CutMix, the unlabelled weight
ramped up; `--quick`, 7 patients, 4,080 steps) had a validation Dice of 0.843 and 0.840 (two seeds), students
of this form 0.837 to 0.842 (three).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cmrssp.data import store
from cmrssp.data.dataset import PREDICTED, PREDICTIONS
from cmrssp.data.subject import LabelFile
from cmrssp.errors import UserError, one_line
from cmrssp.files import write_json
from cmrssp.weights import checkpoints
from cmrssp.weights.checkpoints import Checkpoint


@dataclass(frozen=True)
class LabelMaps:
    """The label maps of a folder, and the networks that predicted them, without weights."""

    folder: Path
    cines: dict[str, tuple[Path, list[int]]]  # {digest of the images: (label map, good frames, one or more)}
    teachers: list[Checkpoint]
    options: dict[str, bool]  # of --predict: flips, largest_component

    def attach(
        self, cines: store.Store, keys: Iterable[str], cache: Path, *, skip_broken: bool
    ) -> tuple[store.Store, dict[str, list[int]]]:
        """The store, in which the subjects `keys` have these maps as their labels, and {subject key: its good
        frames} of those that have any. Raises UserError if none has.
        """
        images = cines.digests(keys)
        found = {key: self.cines[image] for key, image in images.items() if image in self.cines}
        ours = {"label_ids": (0, 1, 2, 3), "ed": None, "es": None}
        maps = {key: {"labels": (LabelFile(path),), **ours} for key, (path, _) in found.items()}
        subjects = [replace(subject, **maps.get(subject.key, {})) for subject in cines.subjects]
        cines = store.build(subjects, cache, labels=True, skip_broken=skip_broken)
        labelled = {key: cines.labels[cines.index[key]].frames for key in found if key in cines.index}
        frames = {key: [t for t in found[key][1] if t in known] for key, known in labelled.items()}
        if not any(frames.values()):
            raise UserError(
                f"--predicted {self.folder}: none of its {len(self.cines)} cines with good frames is one of "
                f"the {len(images)} training subjects without labels in use"
            )
        return cines, {key: good for key, good in frames.items() if good}


def forget(folder: Path) -> None:
    """Before the label maps change: what predictions.json says of them will no longer hold. It stays, empty,
    as the mark of label maps that are no labels to train on.
    """
    write(folder, {}, [], {})


def write(
    folder: Path, cines: dict[str, dict], networks: Sequence[Checkpoint], options: dict[str, bool]
) -> None:
    """cines: {name: {"digest": of the images, "frames": good enough to train on}}; options: of --predict."""
    made_by = [{"config": each.config, "provenance": each.provenance.to_dict()} for each in networks]
    content = {"cines": dict(sorted(cines.items())), "options": options, "networks": made_by}
    write_json(folder / PREDICTIONS, content)


def read(folder: Path) -> LabelMaps:
    """Raises UserError for a folder without a predictions.json that `write` made."""
    path = folder / PREDICTIONS
    try:
        content = json.loads(path.read_text())
        teachers = [checkpoints.parse(path, {"state_dict": {}, **each}) for each in content["networks"]]
        if not teachers:
            raise ValueError("no network")
        named = {name: cine for name, cine in content["cines"].items() if cine["frames"]}
        cines = {
            c["digest"][:16]: (folder / f"{name}{PREDICTED}", [*map(int, c["frames"])])
            for name, c in named.items()
        }
        return LabelMaps(folder, cines, teachers, content["options"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--predicted {path}: expected a file of --predict, got {one_line(error)}") from None
