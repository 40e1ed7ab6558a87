"""The command line: ``folora run`` and its stages, one config for all.

Options are the fields of the config dataclasses by their dotted names, the same as in a YAML file
given by ``--config``; flags win over the file. Wrong input ends with one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging as transformers_logging

from folora import ranks
from folora.comparison import Comparison, arms
from folora.config import FoLoraConfig, option_names, parse_yaml, read_yaml
from folora.disk import write_text
from folora.errors import ConfigError, FoLoraError, nearest
from folora.interruption import Interrupted, interruptible
from folora.loading import required
from folora.methods import METHODS
from folora.pictures import frontier_picture, norm_picture
from folora.pipeline import ADAPTER, COMPARISON, Run
from folora.planning import Plan, Stage, plan, widths
from folora.report import comparison_table
from folora.results import load_results

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
        raise ConfigError(f"unknown option {word}{nearest(word, known)}")
    values: dict[str, Any] = FoLoraConfig.paper().to_dict() if options.preset else {}
    if options.config:
        _merge(values, read_yaml(options.config))
    for name in option_names():
        if hasattr(options, name):
            _merge(values, _nested(name, _value(getattr(options, name))))
    return options, FoLoraConfig.from_dict(values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    console = Console(stderr=True)
    try:
        with interruptible():
            options, config = parse(sys.argv[1:] if arguments is None else arguments)
            ranks.join(config.device)
            _set_up_logging(options.verbose)
            _execute(options, config)
    except FoLoraError as error:
        console.print(f"[bold red]folora:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except Interrupted as signalled:
        console.print(
            "\n[bold]folora:[/] stopped. What is finished is on disk; give the same command again "
            "to go on."
        )
        return signalled.exit_code
    return 0


def entry() -> NoReturn:
    """Console script."""
    code = main()
    if code == 0:
        ranks.leave()
    # At once: not when an eigenproblem is solved, or another process has answered.
    if code > 128 or ranks.count() > 1:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _execute(options: argparse.Namespace, config: FoLoraConfig) -> None:
    command = options.command
    if command in ("plan", "compare") and ranks.count() > 1:
        raise ConfigError(f"folora {command} works in one process; start it without a launcher")
    if command == "plan":
        _print_plan(_plan(config, options.processes))
        return
    run = Run(config)
    if command == "compare":
        _compare(run, options)
        return
    if command == "run":
        _print_report(run.run())
        return
    if command == "export":
        path = Path(options.to) if options.to else None
        report = run.export(path, options.rank, "merged" if options.merged else "adapter")
        target = path or run.folder / ("merged" if options.merged else ADAPTER)
        _say(f"wrote {target}" + (f", rank {report.rank}" if report.rank else ""))
        if report.relative_error:
            _say(
                f"relative error of the update: {report.relative_error:.2%} in all, at most "
                f"{report.worst_relative_error:.2%} ({report.worst_layer})"
            )
        return
    reads_task = command in ("measure", "train") or (
        command in ("sample", "base") and run.config.ends_early
    )
    run.check(needs_data=reads_task)
    run.check_stage(command)
    with run.alone():
        run.write_config()
        if command == "base":
            _say(f"wrote {run.share(Path(options.to) if options.to else None)}")
            return
        getattr(run, command)()
        if command == "train":
            _print_report(run.report())


def _compare(run: Run, options: argparse.Namespace) -> None:
    """All arms, then a table and two pictures beside their files."""
    chosen = arms(
        options.methods.split(","),
        _numbers(options.learning_rates, "--learning-rates", float),
        **{"training.seed": _numbers(options.seeds, "--seeds", int)},
    )
    folder = run.folder / COMPARISON
    task = Path(required(run.config.dataset, "dataset")).name.split(".")[0]
    comparison = Comparison(
        run, folder, stage=run.name, task=task, command=shlex.join(["folora", *sys.argv[1:]])
    )
    for arm in chosen:
        comparison.config(arm)  # a wrong one is found before the model is loaded
    run.check(needs_data=True)
    run.check_stage("compare")
    comparison.check(chosen)
    with run.alone():
        run.write_config()
        for _ in comparison.run_all(chosen):
            pass
    results = [r for r in load_results(folder) if r.task == task and r.stage == run.name]
    table = comparison_table(results, task)
    write_text(folder / "comparison.md", table.markdown())
    frontier_picture(results, task, folder / "frontier.png")
    norm_picture(results, task, folder / "norms.png")
    Console().print(table.rich())
    print(f"wrote {folder}: one .json an arm, comparison.md, frontier.png, norms.png")


def _numbers(text: str, flag: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{flag} is {text!r}, but must be numbers with commas between") from error


def _plan(config: FoLoraConfig, processes: int) -> Plan:
    if not config.dataset:
        return plan(config, processes=processes)
    task = Run(_with_output(config)).task
    lengths = [len(e.input_ids) for e in task.train]
    return plan(config, sum(lengths), len(lengths), max(lengths), processes)


def _with_output(config: FoLoraConfig) -> FoLoraConfig:
    return config if config.output else FoLoraConfig.from_dict({**config.to_dict(), "output": "."})


def _print_plan(found: Plan) -> None:
    console = Console()
    shapes = Table("width d_in", "shared inputs", "layers", "whole basis each", title="Inputs")
    for d, groups, layers in widths(found.groups):
        shapes.add_row(str(d), str(groups), str(layers), _bytes(4 * d * d))
    console.print(shapes)
    stages = Table("stage", "memory", "disk", "time", title="Stages")
    for stage in found.stages:
        stages.add_row(stage.name, _bytes(stage.memory), _bytes(stage.disk), _durations(stage))
    console.print(stages)
    keeping = Table("bases in training", "on the device", "on the host", title="Where bases lie")
    for way in found.storages:
        keeping.add_row(way.title, _bytes(way.device), _bytes(way.host))
    console.print(keeping)
    console.print(
        f"{found.layers} layers read {len(found.groups)} inputs; {found.trainable:,} of "
        f"{found.parameters:,} parameters are trained."
    )
    own, advice = found.storages[0], found.advice
    free = f"of {_bytes(found.free)} that are free"
    rows, tokens = found.batch
    console.print(
        f"A forward and backward pass over {rows} rows of {tokens} tokens takes "
        f"{_bytes(found.activations)}, part of what training takes."
    )
    if advice is None:
        console.print(
            f"Training needs {_bytes(own.training)} {free}: too much. Fewer rows at once "
            "(--training.batch_size, with more --training.gradient_accumulation_steps) or "
            "--training.gradient_checkpointing true take less."
        )
    elif advice is not own:
        console.print(
            f"Training needs {_bytes(own.training)} {free}; with {advice.options} it needs "
            f"{_bytes(advice.training)}."
        )
    else:
        console.print(f"Training takes {_bytes(own.training)} {free}.")
    console.print(
        "Times are estimates from a second of measuring here; expect a factor of three. Where there are two, "
        "sampling ends when it is enough (sampling.tolerance), between its first look and its ceiling."
    )


def _say(what: str | Table) -> None:
    """Print, once for all processes."""
    if ranks.rank() == 0:
        Console().print(what, markup=False, highlight=False, soft_wrap=isinstance(what, str))


def _print_report(report: dict[str, Any]) -> None:
    table = Table(title=f"After {report['steps']} steps")
    for column in ("", "base", "adapted"):
        table.add_column(column, justify="left" if not column else "right")
    base, adapted, norm = report["base"], report["adapted"], report["total_norm"]
    rows = [
        ("learned: task loss (nats a response token)", base["task_loss"], adapted["task_loss"]),
        ("kept: KL to the base (nats a token)", base["kl"], adapted["kl"]),
        ("kept: change in cross-entropy", base["ce_change"], adapted["ce_change"]),
        ("cost: norm of the update", 0.0, norm["frobenius"]),
        ("cost: norm of the update in H", 0.0, norm["h_norm"]),
    ]
    for what, before, after in rows:
        table.add_row(what, _number(before), _number(after))
    _say(table)
    _say(f"adapter: {report['adapter']}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _durations(stage: Stage) -> str:
    if stage.soonest is None or stage.seconds is None:
        return "not known"
    soonest, latest = _duration(stage.soonest), _duration(stage.seconds)
    return latest if soonest == latest else f"{soonest} to {latest}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _value(text: str) -> Any:
    """A flag's text as YAML would read it; 1e-3 is a number here too."""
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


def _set_up_logging(verbose: bool) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False)
    level = logging.INFO if ranks.rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)
    transformers_logging.disable_progress_bar()
    if not verbose:
        for library in ("httpx", "datasets", "transformers", "huggingface_hub", "accelerate"):
            logging.getLogger(library).setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        warnings.simplefilter("ignore", FutureWarning)


if __name__ == "__main__":
    entry()
