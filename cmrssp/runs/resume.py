"""Runs that were stopped go on: which run --resume names, and whether its data is still the same."""

from pathlib import Path

from cmrssp.errors import UserError
from cmrssp.hardware import distributed
from cmrssp.runs.folder import Run
from cmrssp.weights import checkpoints


def find(resume: str | None, out: str | None, kind: str) -> Run | None:
    """The run that `--resume auto|RUN` and `--out` name, None for a new start. Raises UserError."""
    if resume is None:
        return None
    auto = resume == "auto"
    if auto and out is None:
        raise UserError("--resume auto: needs --out, the folder of the run")
    run = Run(Path(out if auto else resume).expanduser())
    if not all((run.folder / name).is_file() for name in ("args.json", "split.json")):
        if auto:
            return None
        raise UserError(f"--resume {run.folder}: expected the folder of a run, with args.json and split.json")
    if run.args["kind"] != kind:
        raise UserError(f"--resume {run.folder}: expected a {kind}, got a {run.args['kind']}")
    if not auto and out is not None and Path(out).expanduser().resolve() != run.folder.resolve():
        raise UserError(f"--out {out}: a resumed run stays in its folder, {run.folder}; leave --out out")
    return None if auto and not run.saved else run


def begin(out: str | None, default_name: str, *, again: bool) -> Run:
    """A new run in its locked folder, made as in `Run.create`. Raises UserError if it is another's."""
    made = distributed.from_main(lambda: str(Run.create(out, default_name, again=again).folder))
    run = Run(Path(made))
    run.lock()
    if distributed.is_main() and run.saved:
        raise UserError(f"--out {run.folder}: another process has trained in it meanwhile")
    print(f"run folder: {run.folder}")
    return run


def go_on(run: Run, images: dict[str, str], labels: dict[str, str]) -> dict:
    """Lock an interrupted run, and return its state, the content of last.pt.

    `images` and `labels` are the digests (`Store.digests`) of the data now. Raises UserError if they differ
    from those that the run began with, if there is no state, or if another process trains in the folder.
    """
    run.lock()
    if not (run.folder / "last.pt").is_file():
        raise UserError(f"{run.folder}: nothing was saved to go on from; start it again in another --out")
    state = checkpoints.read(run.folder / "last.pt")
    recorded = state["provenance"]
    keys = (*recorded["split"]["train"], *recorded["split"]["validation"])
    same_images = all(images.get(key) == recorded["digests"][key] for key in keys)
    if not same_images or recorded["labels"] != labels:
        what = "training or validation cines" if recorded["labels"] == labels else "labels"
        how = "restore them, or start again in another --out"
        raise UserError(f"--resume {run.folder}: its {what} have changed since, or some are gone; {how}")
    steps = f", step {state['steps_done']}" if state["steps_done"] else ""
    print(f"run folder: {run.folder}, going on after epoch {state['epochs_done']}{steps}")
    before, now = run.args["processes"], distributed.world_size()
    if before != now:
        print(f"started with {before} processes, going on with {now}: the augmentation draws will differ")
    return state
