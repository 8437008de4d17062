"""Processes for tests, forked from the one that runs the tests: torch is imported already."""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from torch.distributed import TCPStore

from cmrssp.cli import entry


class Script:
    """A script's main in a process of its own, as a person starts it: `name` followed by `words`."""

    def __init__(
        self,
        main: Callable,
        *words,
        name: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._files = [tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")]  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            for file, number in zip(self._files, (1, 2), strict=True):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = [name, *map(str, words)]
            os.chdir(cwd)
            os.environ.update(env or {})
            prepare()
            entry.end(main)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def end(self, timeout_s: float = 300) -> tuple[int, str, str]:
        """(exit status, or minus the number of the signal that ended the process; stdout; stderr). Waits for
        the end; a process that does not come to it is killed.
        """
        limit, (pid, status) = time.monotonic() + timeout_s, (0, 0)
        while not pid:
            time.sleep(0.01)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if time.monotonic() > limit:
                os.kill(self.pid, signal.SIGKILL)
        for file in self._files:
            file.seek(0)
        return os.waitstatus_to_exitcode(status), *(file.read() for file in self._files)


def ranks(main: Callable, *words, name: str, cwd: Path, processes: int = 2) -> list[Script]:
    """The processes of one torchrun; this process holds their store, as torchrun's agent does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(Script(main, *words, name=name, cwd=cwd, env=own))
        started[-1].store = store
    return started
