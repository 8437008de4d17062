"""The run folder: args.json, split.json, log.jsonl, last.pt, unet.pt and the figures; how a run goes on."""

import fcntl
import json
import subprocess
from contextlib import suppress
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch

import cmrssp
from cmrssp.errors import UserError
from cmrssp.files import atomic, check_writable, json_object, sweep, write_json
from cmrssp.hardware import distributed
from cmrssp.weights import checkpoints

RUNS = Path("runs")


class Run:
    """One training's folder. Every file in it is whole or absent; only rank 0 writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, out: str | None, default_name: str, *, again: bool = False) -> "Run":
        """Make `out`, or else runs/<default_name>, -2, ... Raises UserError if `out` holds a run, unless
        `again`.
        """
        if out is not None:
            folder = Path(out).expanduser()
            check_writable("--out", folder)
            if not again and any((folder / name).exists() for name in ("args.json", "unet.pt", "last.pt")):
                how = "give another folder, or add --resume auto to go on with it"
                raise UserError(f"--out {out}: already holds a run; {how}")
            folder.mkdir(parents=True, exist_ok=True)
            return cls(folder)
        for number in count(1):
            folder = RUNS / (default_name if number == 1 else f"{default_name}-{number}")
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return cls(folder)

    def start(self, args: dict[str, Any], split: dict[str, list[str]]) -> None:
        """Write what the run was started with."""
        if not distributed.is_main():
            return
        (self.folder / "log.jsonl").unlink(missing_ok=True)  # of a start that left no checkpoint
        write_json(self.folder / "split.json", split)
        versions = {"cmrssp": cmrssp.__version__, "torch": torch.__version__}
        code = {"versions": versions, "git": _git_commit()}
        write_json(self.folder / "args.json", {**args, **code, "processes": distributed.world_size()})

    @cached_property
    def args(self) -> dict[str, Any]:
        """What the run was started with: every flag, by destination; {} if its file is damaged."""
        return json_object(self.folder / "args.json")

    @cached_property
    def split(self) -> dict[str, list[str]]:
        return json.loads((self.folder / "split.json").read_text())

    def lock(self) -> None:
        """Hold the folder until this process ends. Raises UserError if another process trains in it."""
        if not distributed.is_main():
            return
        self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115  closing it would release the lock
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another process is training in this run folder") from None
        sweep(self.folder)

    def go_on(self, images: dict[str, str], labels: dict[str, str], device: torch.device) -> dict[str, Any]:
        """Lock the run, and return its state, the content of last.pt. Raises UserError if there is none, or
        if the digests of the `images` or `labels` (`Store.digests`) are not those that it began with.
        """
        self.lock()
        if not (self.folder / "last.pt").is_file():
            raise UserError(
                f"{self.folder}: nothing was saved to go on from; start it again in another --out"
            )
        state = checkpoints.read(self.folder / "last.pt")
        recorded = state["provenance"]
        keys = (*recorded["split"]["train"], *recorded["split"]["validation"])
        same_images = all(images.get(key) == recorded["digests"][key] for key in keys)
        if not same_images or recorded["labels"] != labels:
            what = "training or validation cines" if recorded["labels"] == labels else "labels"
            how = "restore them, or start again in another --out"
            raise UserError(f"--resume {self.folder}: its {what} have changed since, or some are gone; {how}")
        steps = f", step {state['steps_done']}" if state["steps_done"] else ""
        print(f"run folder: {self.folder}, going on after epoch {state['epochs_done']}{steps}")
        before, now = self.args["processes"], distributed.world_size()
        if before != now:
            print(f"started with {before} processes, going on with {now}: the augmentation draws will differ")
        if device.type not in self.args["device"]:
            print(f"started on {self.args['device']}, going on with {device}: the numbers will differ")
        return state

    def save(self, content: dict[str, Any]) -> None:
        """Write last.pt. Rank 0 writes, the others wait for it."""
        with distributed.main_first():
            if distributed.is_main():
                checkpoints.save(self.folder / "last.pt", content)

    def finish(self, content: dict[str, Any]) -> None:
        """Write unet.pt, which says that the run is finished: all else that it leaves must be there."""
        if distributed.is_main():
            checkpoints.save(self.folder / "unet.pt", content)

    @property
    def finished(self) -> bool:
        return (self.folder / "unet.pt").is_file()

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON line in one write."""
        if distributed.is_main():
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        path = self.folder / "log.jsonl"
        records = []
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            with suppress(ValueError):  # a full disk leaves half a line
                records.append(json.loads(line))
        return records

    def keep_log(self, epochs: int) -> None:
        """Drop the records after so many epochs: these epochs are trained again."""
        if distributed.is_main():
            kept = [record for record in self.records() if record["epoch"] <= epochs]
            with atomic(self.folder / "log.jsonl") as file:
                file.write("".join(json.dumps(record) + "\n" for record in kept).encode())


def find(resume: str | None, out: str | None, kind: str) -> Run | None:
    """The run that `--resume auto|RUN` and `--out` name, None for a new start. Raises UserError."""
    if resume is None:
        return None
    auto = resume == "auto"
    if auto and out is None:
        raise UserError("--resume auto: needs --out, the folder of the run")
    run = Run(Path(out if auto else resume).expanduser())
    started = all((run.folder / name).is_file() for name in ("args.json", "split.json"))
    saved = run.finished or (run.folder / "last.pt").is_file()
    if auto and not (started and saved):
        return None
    if not started:
        raise UserError(f"--resume {run.folder}: expected the folder of a run, with args.json and split.json")
    if (found := run.args.get("kind", "damaged args.json")) != kind:
        raise UserError(f"--resume {run.folder}: expected a {kind}, got a {found}")
    if out is not None and Path(out).expanduser().resolve() != run.folder.resolve():
        raise UserError(f"--out {out}: a resumed run stays in its folder, {run.folder}; leave --out out")
    return run


def newest_finetuned() -> Path:
    """The newest folder below runs/ whose fine-tuning has finished. Raises UserError if there is none."""
    runs = [Run(path.parent) for path in RUNS.glob("*/args.json")]
    finished = [run.folder for run in runs if run.finished and run.args.get("kind") == "fine-tuning"]
    if not finished:
        how = "run finetune.py first, or name one with --checkpoint"
        raise UserError(f"no finished fine-tuned run in {RUNS.resolve()}; {how}")
    return max(finished, key=lambda folder: (folder / "unet.pt").stat().st_mtime_ns)


def _git_commit() -> str | None:
    """The commit of the running code; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError):  # there is no git
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None
