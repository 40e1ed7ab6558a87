"""Command lines: the options of the config as flags by their dotted names, for each command those it uses.

Built on click. Flags win over the file given by ``--config``, which for later stages is by default the
``config.yaml`` of the run folder. Nothing here imports PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

import folora
from folora.config import FoLoraConfig, Option, option_names, parse_yaml, read_yaml
from folora.config.folora_config import nested
from folora.config.options import kinds
from folora.config.renamed import removal
from folora.errors import ConfigError, nearest
from folora.methods import METHODS, Method
from folora.training.sft_options import KNOWN

OPTIONS = option_names()
FLAGS: dict[str, Any] = {
    **{name: option.type for name, option in OPTIONS.items()},
    **{n: Any for option in sorted(KNOWN) if (n := f"training.{option}") not in OPTIONS},
    **{f"method.{n}": f.annotation for n, f in Method.model_fields.items() if n != "name"},
}
"""By its dotted name, the type of every option that can be given as a flag."""
SHORT = {"adapter.r": "--r", "training.learning_rate": "--lr", "training.max_steps": "--max-steps"}

MODEL = ("model", "output", "dtype", "quantize", "shard", "device", "revision", "trust_remote_code")
DATA = ("dataset", "data", "seed")
ADAPTER = ("method", "adapter", "sampling.start_token")  # the layers are found by a forward pass
SAMPLES = (*MODEL, *DATA, *ADAPTER, "base", "sampling", "statistics", "spectrum")
ALL = (*SAMPLES, "budget", "anchor", "training")
USES: dict[str, tuple[str, ...]] = {
    "run": ALL,
    "plan": ALL,
    "sample": SAMPLES,
    "measure": (*MODEL, *DATA, *ADAPTER, "base", "statistics"),
    "solve": (*MODEL, *ADAPTER, "spectrum"),
    "train": (
        *MODEL,
        *DATA,
        *ADAPTER,
        "statistics.batch_size",
        "spectrum",
        "budget",
        "anchor",
        "training",
    ),
    "export": (*MODEL, "budget", "base", "sampling", "seed", "statistics.batch_size"),
    "base": SAMPLES,
    "compare": tuple(name for name in ALL if name != "method"),
}
"""The options and sections that each command uses."""
LATER_STAGES = ("measure", "solve", "train", "export")  # they read the run folder's config.yaml

COMMANDS = {
    "run": "All stages: from a model and a data set to an adapter and a report.",
    "plan": "Estimate the memory, disk and time that `folora run` with these options takes.",
    "sample": "Stage 1: text that the model generates itself.",
    "measure": "Stage 2: second moments on that text and on the task.",
    "solve": "Stage 3: the eigenbasis of every shared input.",
    "train": "Stage 4: train in that basis.",
    "export": "Stage 5: an ordinary PEFT adapter, or merged weights.",
    "base": "Samples and C_pre in one file, for every task on the model: --base FILE.",
    "compare": "Train other methods too, and draw what each learned against what it retained.",
}


@dataclass(frozen=True)
class Request:
    """What a command line asks for beside the config; a command reads those of its own."""

    command: str
    verbose: bool = False
    to: str | None = None  # export, base: where to write
    rank: int | None = None  # export: truncate to this rank
    merged: bool = False  # export: write merged weights
    adapter: str | None = None  # export: a PEFT adapter to scale
    processes: int = 1  # plan: how many work together
    methods: tuple[str, ...] = ()  # compare
    learning_rates: tuple[float, ...] = ()  # compare
    seeds: tuple[int, ...] = ()  # compare


def parse(arguments: Sequence[str]) -> tuple[Request, FoLoraConfig] | None:
    """Arguments to a command and a config; None if they asked for help or the version, which is printed.

    Raises:
        ConfigError: An unknown option (with the nearest right one) or a wrong value.
    """
    try:
        found = _group().main(list(arguments), "folora", standalone_mode=False)
    except click.NoSuchOption as error:
        raise ConfigError(_unknown(error.option_name, error.ctx)) from None
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        place = context.command_path if context else "folora"
        raise ConfigError(f"{error.format_message().rstrip('.')} (see {place} --help)") from None
    return found if isinstance(found, tuple) else None


def _unknown(flag: str, context: click.Context | None) -> str:
    """The message for a flag that a command does not have."""
    name = flag.lstrip("-")
    if sentence := removal(name):
        return sentence
    command = context.info_name if context else None
    if command in USES and (name in FLAGS or flag in SHORT.values()):
        return f"folora {command} does not use {flag}; leave it out, or give it in a config file"
    flags = [flag for p in context.command.params for flag in p.opts] if context else []
    return f"unknown option {flag}{nearest(flag, flags)}"


class _Group(click.Group):
    """Lists its commands in the order of a run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _group() -> click.Group:
    group = _Group(
        "folora",
        commands=[_command(name) for name in COMMANDS],
        help="Fine-tune a model and keep what it knew (arXiv:2606.00132).",
        no_args_is_help=False,
    )
    return click.version_option(folora.__version__, message="folora %(version)s")(group)


class _Command(click.Command):
    """A command that returns a request and a config, and whose help lists its options in groups."""

    def invoke(self, ctx: click.Context) -> tuple[Request, FoLoraConfig]:
        given = dict(ctx.params)
        changes = {
            p.dotted: _value(text, FLAGS[p.dotted])
            for p in self.params
            if isinstance(p, _ConfigOption) and (text := given.pop(p.name)) is not None
        }
        values = nested(FoLoraConfig.paper().differences()) if given.pop("preset") else {}
        if file := given.pop("config") or self._config_of_run(changes.get("output")):
            _merge(values, read_yaml(file))
        # Flags such as --method.protect change ingredients of the file's method.
        own = {"method": values["method"]} if "method" in values else {}
        _merge(values, nested({**own, **changes}))
        return Request(str(self.name), **given), FoLoraConfig.from_dict(values)

    def _config_of_run(self, output: str | None) -> str | None:
        """The config file that the first stage wrote, for the later stages."""
        file = os.path.join(output or "", "config.yaml")
        return file if output and self.name in LATER_STAGES and os.path.isfile(file) else None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                title = param.group if isinstance(param, _ConfigOption) else f"folora {self.name}"
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=34)


class _Option(click.Option):
    """An option whose value is never taken for another flag."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("--"):
            raise click.BadOptionUsage(self.opts[0], f"Option {self.opts[0]!r} needs a value", ctx)
        return super().type_cast_value(ctx, value)


class _ConfigOption(_Option):
    """A flag for an option of the config, by its dotted name; the text is read by the option's type."""

    def __init__(self, name: str) -> None:
        self.dotted = name
        option = OPTIONS.get(name)
        flags = [f"--{name}", *([SHORT[name]] if name in SHORT else [])]
        section, _, _ = name.partition(".")
        self.group = section if "." in name else "model, data and method"
        super().__init__(
            [*flags, name.replace(".", "__")],
            metavar=_metavar(option.type) if option else "VALUE",
            help=_help(option) if option else None,
            hidden=option is None,
        )


def _command(name: str) -> click.Command:
    used = USES[name]
    flags = [n for n in FLAGS if n in used or n.partition(".")[0] in used]
    epilog = None
    if "training" in used:
        epilog = (
            "Every option of trl.SFTConfig can be given by its name: --training.NAME VALUE, such as "
            "--training.packing true."
        )
    return _Command(
        name,
        params=[*_own_options(name), *map(_ConfigOption, flags)],
        help=COMMANDS[name],
        short_help=COMMANDS[name],
        epilog=epilog,
        context_settings={"max_content_width": 100},
    )


def _own_options(name: str) -> list[click.Parameter]:
    """The options of a command that are no part of the config."""
    default = " Default: config.yaml in the run folder." if name in LATER_STAGES else ""
    found: list[click.Parameter] = [
        _Option(
            ["--config"],
            metavar="FILE",
            help=f"YAML file with the options below; flags win.{default}",
        ),
        _Option(
            ["--preset"], type=click.Choice(["paper"]), help="Start from FoLoraConfig.paper()."
        ),
        click.Option(["--verbose"], is_flag=True, help="Show what libraries log."),
    ]
    if name in ("export", "base"):
        kind = "DIR" if name == "export" else "FILE"
        found.append(_Option(["--to"], metavar=kind, help="Default is in the run folder."))
    if name == "export":
        found += [
            _Option(["--rank"], type=int, help="Truncate to this rank, stating the error."),
            click.Option(["--merged"], is_flag=True, help="Write merged weights."),
            _Option(
                ["--adapter"],
                metavar="DIR",
                help="Any PEFT LoRA adapter: write it to --to, scaled to --budget. --output is not used.",
            ),
        ]
    if name == "plan":
        processes = _Option(
            ["--processes"], type=int, default=1, show_default=True, help="That work together."
        )
        found.append(processes)
    if name == "compare":
        found += [
            _several("--methods", str, "folora,lora", f"Of {', '.join(METHODS)}."),
            _several("--learning-rates", float, "1e-4,3e-4,1e-3", "Peak learning rates."),
            _several("--seeds", int, "0", "Of initialization and training."),
        ]
    return found


def _several(flag: str, kind: type, default: str, help: str) -> click.Option:
    """An option for values separated by commas."""

    def split(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            what = f"{flag} is {text!r}, but must be numbers with commas between"
            raise click.UsageError(what, click.get_current_context()) from None

    return _Option(
        [flag], type=split, default=default, show_default=True, metavar="A,B,...", help=help
    )


def _value(text: str, hint: Any) -> Any:
    """A flag's text as a value of an option's type; any other text is left to the config to refuse.

    ``null`` is None for an option that may be None. Text that begins with a bracket or a brace is YAML for
    an option that may be a list or a mapping; a mapping to numbers may also be written ``a=0.5,b=0.5``.
    """
    found = kinds(hint)
    if text == "null" and (NoneType in found or hint is Any):
        return None
    if hint is Any or (text[:1] in ("[", "{") and {tuple, dict, Method} & {*found}):
        with suppress(ConfigError):
            return parse_yaml(text)
    if dict in found and "=" in text:
        pairs = (part.rpartition("=") for part in text.split(","))
        return {name: _value(share, float) for name, _, share in pairs}
    for kind in found:
        with suppress(ValidationError):
            if kind in (int, float, bool, str):
                return TypeAdapter(kind).validate_strings(text)
    return text


NAMES = {
    str: "TEXT",
    int: "INT",
    float: "NUMBER",
    bool: "true|false",
    tuple: "[A, B]",
    dict: "NAME=SHARE,...",
    Method: "NAME",
}


def _metavar(hint: Any) -> str:
    """How a help text writes an option's type."""
    return "|".join(NAMES.get(kind, str(kind)) for kind in kinds(hint) if kind is not NoneType)


def _help(option: Option) -> str:
    parts = [option.help]
    if option.allowed:
        parts.append(f"must {option.allowed}")
    if (default := option.default) is not None:
        parts.append(f"default: {str(default).lower() if isinstance(default, bool) else default}")
    return "; ".join(parts)


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Put nested `more` over `values`, section by section, in place; a method replaces another."""
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(values.get(name), dict) and name != "method"
        values[name] = {**values[name], **value} if both else value
