"""The run folder: args.json, split.json, log.jsonl, last.pt, unet.pt and the figures."""

import fcntl
import json
import subprocess
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch

import cmrssp
from cmrssp.errors import UserError
from cmrssp.files import atomic, check_writable, sweep
from cmrssp.hardware import distributed
from cmrssp.weights import checkpoints

RUNS = Path("runs")
_STATE = {"optimizer", "progress", "epochs_done", "steps_done"}  # what last.pt has beside unet.pt's content


class Run:
    """One training's folder. Every file in it is whole or absent; only rank 0 writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, out: str | None, default_name: str, *, again: bool = False) -> "Run":
        """Make the folder `out`, or runs/<default_name> with -2, -3, ... if that is taken.

        Raises UserError if `out` holds a run already, unless it is started `again`.
        """
        if out is not None:
            folder = Path(out).expanduser()
            check_writable("--out", folder)
            if any((folder / name).exists() for name in ("args.json", "unet.pt", "last.pt")) and not again:
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
        self.write_json("split.json", split)
        versions = {"cmrssp": cmrssp.__version__, "torch": torch.__version__}
        code = {"versions": versions, "git": _git_commit()}
        self.write_json("args.json", {**args, **code, "processes": distributed.world_size()})

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

    @property
    def saved(self) -> bool:
        return self.finished or (self.folder / "last.pt").is_file()

    def state(self) -> dict[str, Any]:
        """The content of last.pt. Raises UserError if it is absent or damaged."""
        try:
            state = checkpoints.read(self.folder / "last.pt")
            missing = _STATE - state.keys()
            if not missing:
                return state
            why = f"last.pt has no {', '.join(sorted(missing))}"
        except FileNotFoundError:
            why = "it was never saved"
        except UserError:
            why = "last.pt is damaged"
        raise UserError(f"{self.folder}: nothing to go on from, {why}; start it again in another --out")

    def write_json(self, name: str, content: Any) -> None:
        if distributed.is_main():
            with atomic(self.folder / name) as file:
                file.write((json.dumps(content, indent=1, default=str, allow_nan=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON line in one write."""
        if not distributed.is_main():
            return
        path = self.folder / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None

    def records(self) -> list[dict[str, Any]]:
        path = self.folder / "log.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        records = []
        for line in lines:
            with suppress(ValueError):  # the last line may be half-written
                records.append(json.loads(line))
        return records

    def keep_log(self, epochs: int) -> None:
        """Drop the records after so many epochs: these epochs are trained again."""
        if distributed.is_main():
            kept = [record for record in self.records() if record["epoch"] <= epochs]
            with atomic(self.folder / "log.jsonl") as file:
                file.write("".join(json.dumps(record) + "\n" for record in kept).encode())


def newest_finetuned() -> Path:
    """The newest folder below runs/ whose fine-tuning has finished. Raises UserError if there is none."""
    finished = []
    for arguments in RUNS.glob("*/args.json"):
        run = Run(arguments.parent)
        if run.finished and run.read_json("args.json").get("kind") == "fine-tuning":
            finished.append(((run.folder / "unet.pt").stat().st_mtime_ns, run.folder))
    if not finished:
        how = "run finetune.py first, or name one with --checkpoint"
        raise UserError(f"no finished fine-tuned run in {RUNS.resolve()}; {how}")
    return max(finished)[1]


def _git_commit() -> str | None:
    """The commit of the running code; None outside a checkout."""
    command, options = ["git", "rev-parse", "HEAD"], {"capture_output": True, "text": True, "timeout": 5}
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, cwd=Path(__file__).parent, **options).stdout.strip() or None
    return None
