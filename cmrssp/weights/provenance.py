"""Where weights come from: what was trained, on whom, how."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cmrssp.data.dataset import LABEL_SUFFIX


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """One training, and through `init` the training that it started from. Subjects are named by their keys,
    `dataset/id`; a digest identifies the content of images or label maps.
    """

    method: str
    data: list[str]  # as --data names it, absolute
    split: dict[str, list[str]]
    split_seed: int
    seed: int
    subjects: list[str]  # that were trained on
    label_suffix: str = LABEL_SUFFIX
    digests: dict[str, str] = field(default_factory=dict)  # of the images of every subject of the split
    slices: int | None = None  # that were trained on
    epochs: int | None = None  # done so far
    hyperparameters: dict[str, Any] = field(default_factory=dict)  # by flag
    labels: dict[str, str] = field(default_factory=dict)  # fine-tuning: digests of the label maps in use
    all_subjects: bool = False  # fine-tuning: no labelled training subject was left out
    phases: str = "both"  # fine-tuning: labelled frames, ed, es or both
    vendors: list[str] | None = None  # fine-tuning: None means all
    predicted: list[str] = field(default_factory=list)  # subjects that were trained on with predicted labels
    teachers: list["Provenance"] = field(default_factory=list)  # of the networks that predicted them
    predicting: dict[str, bool] = field(default_factory=dict)  # how: flips, largest_component
    augmentation: str = "on"
    init: "Provenance | None" = None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Provenance":
        """Raises TypeError if a field without a default is missing; ignores fields of other versions."""
        known = {each.name: content[each.name] for each in fields(cls) if each.name in content}
        init, teachers = known.get("init"), [cls.from_dict(each) for each in known.get("teachers", ())]
        return cls(**{**known, "init": cls.from_dict(init) if init else None, "teachers": teachers})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def history(self) -> list["Provenance"]:
        """This training, then the one it started from, and so on."""
        return [self, *(self.init.history() if self.init else [])]

    def contributions(self) -> Iterator["Provenance"]:
        """The history, and after each training in it the contributions to its teachers."""
        for link in self.history():
            yield link
            for teacher in link.teachers:
                yield from teacher.contributions()

    def seen(self) -> dict[str, str]:
        """{subject key: method that trained on it}, over all contributions."""
        links = self.contributions()
        return {key: link.method for link in links for key in (*link.subjects, *link.predicted)}

    def image_digests(self) -> dict[str, str]:
        """{subject key: digest of its images} of all subjects in all contributions."""
        return {key: digest for link in self.contributions() for key, digest in link.digests.items()}

    def unfinished(self) -> str:
        """How far the training has come, such as "16 of 500 epochs"; "" if it has ended or does not say."""
        planned = self.hyperparameters.get("epochs")
        ended = None in (planned, self.epochs) or self.epochs >= planned
        return "" if ended else f"{self.epochs} of {planned} epochs"
