"""The run folder: args.json, split.json, log.jsonl, last.pt, unet.pt and the figures."""

import fcntl
import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import cmrssp
from cmrssp.errors import UserError
from cmrssp.files import atomic, check_writable, sweep
from cmrssp.hardware import distributed

RUNS = Path("runs")


class Run:
    """One training's folder. Every file in it is whole or absent; rank 0 alone writes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, out: str | None, default_name: str, *, again: bool = False) -> "Run":
        """`out`, which must not hold a run yet, unless it is started `again`; without it runs/<default_name>,
        or -2, -3, ... where that is taken.
        """
        if out is not None:
            folder = Path(out).expanduser()
            check_writable("--out", folder)
            if any((folder / name).exists() for name in ("args.json", "unet.pt", "last.pt")) and not again:
                raise UserError(
                    f"--out {out}: already holds a run; give another folder, or add --resume auto to go on "
                    "with it"
                )
            folder.mkdir(parents=True, exist_ok=True)
            return cls(folder)
        number = 1
        while True:
            folder = RUNS / (default_name if number == 1 else f"{default_name}-{number}")
            try:
                folder.mkdir(parents=True)
                return cls(folder)
            except FileExistsError:
                number += 1

    def write_json(self, name: str, content: Any) -> None:
        if not distributed.is_main():
            return
        with atomic(self.folder / name) as file:
            file.write((json.dumps(content, indent=1, default=str, allow_nan=False) + "\n").encode())

    def start(self, args: dict[str, Any], split: dict[str, list[str]]) -> None:
        if not distributed.is_main():
            return
        (self.folder / "log.jsonl").unlink(missing_ok=True)  # of a start that left no checkpoint
        self.write_json("split.json", split)
        self.write_json(
            "args.json",
            {
                **args,
                "versions": {"cmrssp": cmrssp.__version__, "torch": torch.__version__},
                "git": _git_commit(),
                "processes": distributed.world_size(),
            },
        )

    def log(self, record: dict[str, Any]) -> None:
        """One JSON line, appended in one write."""
        if not distributed.is_main():
            return
        path = self.folder / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None

    def keep_log(self, epochs: int) -> None:
        """Drop what was logged after so many epochs: they are trained again."""
        if not distributed.is_main():
            return
        kept = [record for record in self.records() if record["epoch"] <= epochs]
        with atomic(self.folder / "log.jsonl") as file:
            file.write("".join(json.dumps(record) + "\n" for record in kept).encode())

    def lock(self) -> None:
        """Held until this process ends, however it does. Raises UserError where another one trains in the
        folder.
        """
        if not distributed.is_main():
            return
        self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115  closing it would release the lock
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another process is training in this run folder") from None
        sweep(self.folder)

    def records(self) -> list[dict[str, Any]]:
        path = self.folder / "log.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        records = []
        for line in lines:
            with suppress(ValueError):  # the last may be half-written
                records.append(json.loads(line))
        return records


def newest_finetuned() -> Path:
    """The newest folder below runs/ whose fine-tuning has ended (it holds a unet.pt)."""
    finished = []
    for arguments in RUNS.glob("*/args.json"):
        weights_file = arguments.with_name("unet.pt")
        if weights_file.is_file() and json.loads(arguments.read_text()).get("kind") == "fine-tuning":
            finished.append((weights_file.stat().st_mtime_ns, arguments.parent))
    if not finished:
        raise UserError(
            f"no finished fine-tuned run in {RUNS.resolve()}; run finetune.py first, or name one with "
            "--checkpoint"
        )
    return max(finished)[1]


def _git_commit() -> str | None:
    """The commit of the code that runs, None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
