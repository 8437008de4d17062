"""How a script parses its flags, and how it ends."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from cmrssp.errors import UserError
from cmrssp.hardware import distributed
from cmrssp.runs.signals import Stopped, interrupting

_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_NO_MEMORY += ("CUDNN_STATUS_ALLOC_FAILED", "unable to find an engine")  # cuDNN's work space does not fit


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """The help with its default, unless the flag has none."""
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Prints errors in one line and defaults in the help; takes no abbreviated flags."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        distributed.print_error(f"{self.prog}: error: {message} (--help lists the flags)")
        self.exit(2)


def end(main: Callable[[Sequence[str] | None], int], prog: str | None = None) -> NoReturn:
    """Run a script's main and exit with its status. An error that a user can fix is one line and status 2."""
    prog, status, message = prog or Path(sys.argv[0]).name, 1, ""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (closed, as by `>&-`)
    sys.stdout.reconfigure(errors="replace")  # what the terminal cannot show
    try:
        # torchrun must be able to end its processes itself
        with interrupting() if distributed.world_size() == 1 else nullcontext():
            distributed.start()
            status = main(None)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        status, message = 2, f"error: {error}"
    except Stopped as stop:
        status, message = 128 + stop.number, str(stop)
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        status, message = 128 + number, f"ended by {number.name}"
    except RuntimeError as error:
        if any(text in str(error) for text in _NO_MEMORY):
            how = "a smaller --batch-size, fewer --channels, --amp fp16, --compile off or --device-cache off"
            status, message = 2, f"error: out of memory; try {how} ({str(error).splitlines()[0]})"
        elif distributed.is_process_lost(error):
            message = "error: stopped, because another process has ended"
        else:
            raise
    finally:
        if message:
            distributed.print_error(f"{prog}: {message}")
        distributed.finish(failed=status != 0)
    sys.exit(status)
