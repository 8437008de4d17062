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

_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine",  # what cuDNN says where its work space does not fit
)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """The default behind the help, where there is one to tell."""
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Errors in one line; flags only as they are spelled; defaults in the help."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        distributed.print_error(f"{self.prog}: error: {message} (--help lists the flags)")
        self.exit(2)


def end(main: Callable[[Sequence[str] | None], int], prog: str | None = None) -> NoReturn:
    """Run a script's main and exit with its status. An error that a user can fix is one line and status 2."""
    prog, status = prog or Path(sys.argv[0]).name, 1
    try:
        # torchrun must be able to end its processes itself
        with interrupting() if distributed.world_size() == 1 else nullcontext():
            distributed.start()
            status = main(None)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, as `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        distributed.print_error(f"{prog}: error: {error}")
        status = 2
    except Stopped as stop:
        distributed.print_error(f"{prog}: {stop}")
        status = 128 + stop.number
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        distributed.print_error(f"{prog}: ended by {number.name}")
        status = 128 + number
    except RuntimeError as error:
        if any(text in str(error) for text in _NO_MEMORY):
            distributed.print_error(
                f"{prog}: error: the memory is too small for these settings, or others fill it; try a "
                f"smaller --batch-size, fewer --channels or --amp fp16 ({str(error).splitlines()[0]})"
            )
            status = 2
        elif distributed.is_process_lost(error):
            distributed.print_error(f"{prog}: error: stopped, because another of the processes has ended")
        else:
            raise
    finally:
        distributed.finish(failed=status != 0)
    sys.exit(status)
