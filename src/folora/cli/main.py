"""The command line: ``folora run`` and its stages, one config for all.

Wrong input ends with one sentence and exit code 2. What a command does is in `commands`, which is not
imported before its options are read.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import NoReturn, TextIO

from rich.console import Console
from rich.markup import escape

from folora.cli.parsing import parse
from folora.errors import ConfigError, FoLoraError
from folora.runtime.signals import Interrupted, interruptible


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        with interruptible():
            _check_place()
            if (parsed := parse(words)) is not None:
                request, config = parsed
                if not request.verbose:
                    _quiet_imports()
                from folora.cli import commands  # imports torch, which takes seconds

                commands.execute(request, config)
            if sys.stdout is not None:
                sys.stdout.flush()
    except FoLoraError as error:
        _say(str(error))
        return 2
    except Interrupted as signalled:
        _say("stopped. Finished work is on disk; rerun the command to resume.", "\n[bold]")
        return signalled.exit_code
    except BrokenPipeError:  # such as of `| head`, which wants no more
        _discard(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk behind stdout, no more files to open, ...
        if "--verbose" in words:
            traceback.print_exc()
        _discard(sys.stdout)
        _say(f"{error}. Finished work is on disk; rerun the command to resume.")
        return 2
    except Exception as error:
        traceback.print_exc()
        _say(
            f"unexpected {type(error).__name__}. This is a bug in folora or in a library below it; "
            "please report it with the lines above. Finished work is on disk."
        )
        return 1
    return 0


def _quiet_imports() -> None:
    """Silence libraries while they are imported, before `commands` sets up logging."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # PEFT imports it where it is installed
    warnings.simplefilter("ignore", FutureWarning)


def _say(what: str, style: str = "[bold red]") -> None:
    """Print to stderr, if it can be written."""
    try:
        console = Console(stderr=True)
        console.print(f"{style}folora:[/] {escape(what)}", highlight=False, soft_wrap=True)
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def _check_place() -> None:
    """Refuse a working directory that was deleted: paths are relative to it. Raises ConfigError."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            "the working directory does not exist any more; change to another"
        ) from error


def _discard(stream: TextIO | None) -> None:
    """Redirect a stream that cannot be written to /dev/null, or Python would fail again at exit."""
    if stream is not None:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _repair_streams() -> None:
    """Open the standard streams that are closed, and replace characters that they cannot encode."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; the next file that is opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def entry() -> NoReturn:
    """Console script."""
    _repair_streams()
    code = main()
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
    # At once, without waiting for a thread that solves an eigenproblem or for another process.
    if code > 128 or (code and several):
        with suppress(OSError, AttributeError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
