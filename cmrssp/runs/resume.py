"""Runs that were stopped go on: which run --resume names, and whether its data is still the same."""

from pathlib import Path
from typing import Any

from cmrssp.errors import UserError
from cmrssp.hardware import distributed
from cmrssp.runs.folder import Run


class Interrupted(Run):
    """A run that --resume names, with what it was started with."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.args: dict[str, Any] = dict(self.read_json("args.json"))
        self.split: dict[str, list[str]] = self.read_json("split.json")


def find(resume: str | None, out: str | None, kind: str) -> Interrupted | None:
    """The run that `--resume auto|RUN` and `--out` name, None for a new start. Raises UserError."""
    if resume is None:
        return None
    auto = resume == "auto"
    if auto and out is None:
        raise UserError("--resume auto: needs --out, the folder of the run")
    folder = Path(out if auto else resume).expanduser()
    if not (folder / "args.json").is_file() or not (folder / "split.json").is_file():
        if auto:
            return None
        expected = "the folder of a run, with args.json and split.json in it"
        raise UserError(f"--resume {folder}: expected {expected}")
    try:
        run = Interrupted(folder)
        if not run.split.keys() >= {"train", "validation", "test"}:
            raise ValueError("split.json names no subjects")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: its args.json or split.json is damaged ({error})") from None
    if run.args.get("kind") != kind:
        raise UserError(f"--resume {folder}: expected a {kind}, got a {run.args.get('kind')}")
    if not auto and out is not None and Path(out).expanduser().resolve() != folder.resolve():
        raise UserError(f"--out {out}: a resumed run stays in its folder, {folder}; leave --out out")
    return None if auto and not run.saved else run


def open_run(
    interrupted: Interrupted | None,
    out: str | None,
    default_name: str,
    images: dict[str, str],
    labels: dict[str, str],
    *,
    again: bool = False,
) -> tuple[Run, dict | None]:
    """(the locked run folder, the state to go on from or None for a new run).

    `images` and `labels` are the digests (`Store.digests`) of the data now. Raises UserError if they differ
    from those that the run began with, or if another process trains in the folder.
    """
    if interrupted is None:
        made = distributed.from_main(lambda: str(Run.create(out, default_name, again=again).folder))
        run = Run(Path(made))
        run.lock()
        if distributed.is_main() and run.saved:
            raise UserError(f"--out {run.folder}: another process has trained in it meanwhile")
        print(f"run folder: {run.folder}")
        return run, None
    run = interrupted
    run.lock()
    state = run.state()
    recorded = state["provenance"]
    keys = (*recorded["split"]["train"], *recorded["split"]["validation"])
    same_images = all(images.get(key) == recorded["digests"][key] for key in keys)
    if not same_images or recorded["labels"] != labels:
        what = "training or validation cines" if recorded["labels"] == labels else "labels"
        how = "restore them, or start again in another --out"
        raise UserError(f"--resume {run.folder}: its {what} have changed since, or some are gone; {how}")
    steps = f", step {state['steps_done']}" if state["steps_done"] else ""
    print(f"run folder: {run.folder}, going on after epoch {state['epochs_done']}{steps}")
    before, now = run.args.get("processes", 1), distributed.world_size()
    if before != now:
        print(f"started with {before} processes, going on with {now}: the augmentation draws will differ")
    return run, state
