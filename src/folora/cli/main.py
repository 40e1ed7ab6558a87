"""The command line: ``folora run`` and its stages, one config for all.

Options are the fields of the config dataclasses by their dotted names, the same as in a YAML file
given by ``--config``; flags win over the file. Wrong input ends with one sentence and exit code 2.
What a command does is in `commands`, which is not imported before its options are read.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TextIO, get_args, get_origin

from rich.console import Console
from rich.markup import escape

import folora
from folora.compare.methods import METHODS
from folora.config import (
    REMOVED,
    FoLoraConfig,
    option_names,
    parse_yaml,
    read_yaml,
    unknown_option,
)
from folora.errors import ConfigError, FoLoraError, nearest
from folora.runtime.signals import Interrupted, interruptible

COMMANDS = {
    "run": "all stages: from a model and a data set to an adapter and a report",
    "plan": "say how much memory, disk and time a run will take",
    "sample": "stage 1: text that the model writes itself",
    "measure": "stage 2: second moments on that text and on the task",
    "solve": "stage 3: the eigenbasis of every shared input",
    "train": "stage 4: train in that basis",
    "export": "stage 5: an ordinary PEFT adapter, or merged weights",
    "base": "samples and C_pre in one file, for every task on the model: --base FILE",
    "compare": "train other methods too, and draw what each learned against what it kept",
}
SHORT = {"adapter.r": "--r", "training.learning_rate": "--lr", "training.max_steps": "--max-steps"}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as folora does: in one sentence, without the usage of eighty flags."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The argument parser; every option of the config is a flag of every command."""
    top = _Parser(
        prog="folora", description="Fine-tune a model and keep what it knew (arXiv:2606.00132)."
    )
    top.add_argument("--version", action="version", version=f"folora {folora.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(
            name, help=help_text, description=help_text, allow_abbrev=False
        )
        command.add_argument("--config", metavar="FILE", help="YAML file with the options below")
        command.add_argument(
            "--preset", choices=["paper"], help="start from FoLoraConfig.paper() instead"
        )
        command.add_argument("--verbose", action="store_true", help="show what libraries log")
        if name == "export":
            command.add_argument("--to", metavar="DIR", help="folder; default is in the run folder")
            command.add_argument(
                "--rank", type=int, help="cut back to this rank, stating the error"
            )
            command.add_argument("--merged", action="store_true", help="write merged weights")
        if name == "plan":
            command.add_argument(
                "--processes", type=int, default=1, help="that will work together [%(default)s]"
            )
        if name == "base":
            command.add_argument("--to", metavar="FILE", help="default is in the run folder")
        if name == "compare":
            command.add_argument(
                "--methods", default="folora,lora", help=f"of {', '.join(METHODS)} [%(default)s]"
            )
            command.add_argument("--learning-rates", default="1e-4,3e-4,1e-3", help="[%(default)s]")
            command.add_argument("--seeds", default="0", help="[%(default)s]")
        for option, info in option_names().items():
            flags = [f"--{option}", *([SHORT[option]] if option in SHORT else [])]
            command.add_argument(
                *flags,
                dest=option,
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=f"{info['help']} [{info['default']}]".replace("%", "%%"),
            )
    return top


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, FoLoraConfig]:
    """Arguments to a command and a config.

    Raises:
        ConfigError: An unknown option (with the nearest right one) or a wrong value.
    """
    options, unknown = parser().parse_known_args(arguments)
    if unknown:
        known = [f"--{name}" for name in option_names()]
        word = next((u for u in unknown if u.startswith("-")), unknown[0]).split("=")[0]
        if (name := word.removeprefix("--")) in REMOVED:
            raise ConfigError(unknown_option(name))
        raise ConfigError(f"unknown option {word}{nearest(word, known)}")
    values: dict[str, Any] = FoLoraConfig.paper().to_dict() if options.preset else {}
    if options.config:
        _merge(values, read_yaml(options.config))
    for name, info in option_names().items():
        if hasattr(options, name):
            _merge(values, _nested(name, _value(getattr(options, name), info["type"])))
    return options, FoLoraConfig.from_dict(values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        with interruptible():
            _check_place()
            options, config = parse(words)
            if not options.verbose:
                _quiet_imports()
            from folora.cli import commands  # imports torch, which takes seconds

            commands.execute(options, config)
            if sys.stdout is not None:
                sys.stdout.flush()
    except FoLoraError as error:
        _say(str(error))
        return 2
    except Interrupted as signalled:
        _say(
            "stopped. What is finished is on disk; give the same command again to go on.",
            "\n[bold]",
        )
        return signalled.exit_code
    except BrokenPipeError:  # such as of `| head`, which wants no more
        _discard(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk behind stdout, no more files to open, ...
        if "--verbose" in words:
            traceback.print_exc()
        _discard(sys.stdout)
        _say(f"{error}. What is finished is on disk; give the same command again to go on.")
        return 2
    except Exception as error:
        traceback.print_exc()
        _say(
            f"unexpected {type(error).__name__}. This is a bug in folora or in a library below it; "
            "please report it with the lines above. What is finished is on disk."
        )
        return 1
    return 0


def _quiet_imports() -> None:
    """Silence what libraries say while they are imported, before `commands` sets up logging."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # PEFT imports it where it is installed
    warnings.simplefilter("ignore", FutureWarning)


def _say(what: str, style: str = "[bold red]") -> None:
    """Write to stderr, if anyone can read it."""
    try:
        console = Console(stderr=True)
        console.print(f"{style}folora:[/] {escape(what)}", highlight=False, soft_wrap=True)
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def _check_place() -> None:
    """Paths are looked for from the working directory. Raises ConfigError if that was deleted."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            "the working directory does not exist any more; change to another"
        ) from error


def _discard(stream: TextIO | None) -> None:
    """Let a stream that cannot be written swallow what it holds, or Python would fail again at exit."""
    if stream is not None:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _make_streams_sound() -> None:
    """Have the three standard streams be there, and take any character."""
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
    _make_streams_sound()
    code = main()
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
    # At once: not when an eigenproblem is solved, or another process has answered.
    if code > 128 or (code and several):
        with suppress(OSError, AttributeError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _value(text: str, hint: Any) -> Any:
    """A flag's text: as it is for options that are text, otherwise as YAML would read it.

    ``null`` takes an option away that may be missing, and 1e-3 is a number here too. What may be text
    or a list is a list if it begins with a bracket.
    """
    kinds = get_args(hint) if get_origin(hint) in (Literal, UnionType) else (hint,)
    if all(kind in (str, NoneType) or isinstance(kind, str) for kind in kinds):
        return None if text == "null" and NoneType in kinds else text
    if str in kinds and not text.startswith("["):
        return text
    try:
        return (
            float(text) if "e" in text.lower() and text[:1] in "0123456789+-." else parse_yaml(text)
        )
    except ValueError:  # ConfigError is one
        return text


def _nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Put nested `more` over `values`, in place."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict) and name != "extra":
            _merge(values[name], value)
        else:
            values[name] = value


if __name__ == "__main__":
    entry()
