"""What each command of ``folora`` does, and what it prints."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.logging import RichHandler
from rich.table import Table
from transformers.utils import logging as transformers_logging

from folora.cli.parsing import Request
from folora.config import FoLoraConfig
from folora.errors import ConfigError
from folora.metrics.summary import budget_verdict, summary
from folora.pipeline.context import Context
from folora.pipeline.planning import Plan, StageEstimate, plan, widths
from folora.pipeline.run import COMPARISON, Run
from folora.pipeline.scaled_export import export_scaled
from folora.pipeline.training import ADAPTER, MERGED
from folora.runtime import distributed
from folora.runtime.loading import required
from folora.runtime.ownership import check_own, write_own
from folora.runtime.progress import STDERR
from folora.runtime.storage import check_place

RESULTS = "results.jsonl"


def execute(request: Request, config: FoLoraConfig) -> None:
    """Do what a command line asks for, together with the other processes if there are any.

    Raises:
        FoLoraError: What failed, and the remedy.
        Interrupted: A signal was received.
    """
    distributed.init(config.device)
    _set_up_logging(request.verbose)
    _work(request, config)
    distributed.destroy()


def _work(request: Request, config: FoLoraConfig) -> None:
    command = request.command
    if command in ("plan", "compare") and distributed.world_size() > 1:
        raise ConfigError(f"folora {command} works in one process; start it without a launcher")
    if command == "plan":
        _print_plan(_plan(config, request.processes))
        return
    if request.adapter:
        _export_scaled(config, request)
        return
    run = Run(config)
    if command == "compare":
        _compare(run, request)
        return
    if command == "run":
        _print_report(run.run())
        return
    if command == "export":
        run.check_unchanged(command)
        path = _target(request.to)
        report = run.export(path, request.rank, "merged" if request.merged else "adapter")
        target = path or run.folder / (MERGED if request.merged else ADAPTER)
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
    if command == "base":
        run.base_target(_target(request.to))
    run.check(needs_data=reads_task, trains=command == "train")
    run.check_command(command)
    with run.alone():
        run.write_config()
        if command == "base":
            _say(f"wrote {run.base(_target(request.to))}")
            return
        getattr(run, command)()
        if command == "train":
            _print_report(run.report())


def _export_scaled(config: FoLoraConfig, request: Request) -> None:
    """``export --adapter``: any adapter, scaled to a budget."""
    if distributed.world_size() > 1:
        raise ConfigError(
            "folora export --adapter works in one process; start it without a launcher"
        )
    if request.merged or request.rank is not None:
        raise ConfigError("--adapter writes the scaled adapter; leave --rank and --merged out")
    target = _target(required(request.to, "to"))
    assert target is not None and request.adapter is not None
    fit = asdict(export_scaled(config, Path(request.adapter), target))
    _say(budget_verdict(fit))
    _say(f"wrote {target}")


def _target(given: str | None) -> Path | None:
    """The absolute path of ``--to``: ``.`` has no name."""
    return Path(os.path.abspath(given)) if given else None


def _compare(run: Run, request: Request) -> None:
    """All arms, then a table and two pictures beside their results."""
    from folora.compare.arms import arms
    from folora.compare.comparison import Comparison
    from folora.compare.plots import frontier_picture, norm_picture
    from folora.compare.results import load_results
    from folora.compare.tables import comparison_table

    chosen = arms(request.methods, request.learning_rates, **{"training.seed": request.seeds})
    folder = run.folder / COMPARISON
    task = Path(required(run.config.dataset, "dataset")).name.split(".")[0]
    results_file = folder / RESULTS
    comparison = Comparison(
        run, results_file, stage=run.name, task=task, command=shlex.join(["folora", *sys.argv[1:]])
    )
    for arm in chosen:
        comparison.config(arm)  # a wrong one is found before the model is loaded
    check_place(folder, "but must be a folder of this run; move it away", folder=True)
    check_own(folder, COMPARISON, ["comparison.md", "frontier.png", "norms.png"])
    if old := min(folder.glob("*--*.json"), default=None):
        raise ConfigError(
            f"{old} is a result of an older folora, which cannot be read; move it away"
        )
    comparison.check_results(chosen)
    if results_file.exists():
        load_results(results_file)  # a line that cannot be read would end the comparison at its end
    run.check(needs_data=True)
    run.check_command("compare")
    comparison.check(chosen)
    with run.alone():
        run.write_config()
        for _ in comparison.run_all(chosen):
            pass
    results = [r for r in load_results(results_file) if r.task == task and r.stage == run.name]
    table = comparison_table(results, task)
    made: dict[str, Callable[[Path], object]] = {
        "comparison.md": lambda path: path.write_text(table.markdown(), "utf-8"),
        "frontier.png": lambda path: frontier_picture(results, task, path),
        "norms.png": lambda path: norm_picture(results, task, path),
    }
    for name, write in made.items():
        write_own(folder / name, COMPARISON, write)
    Console().print(table.rich())
    print(f"wrote {folder}: {RESULTS}, comparison.md, frontier.png, norms.png")


def _plan(config: FoLoraConfig, processes: int) -> Plan:
    context = Context(config)
    given = context.mixture.given if config.dataset or config.sampling.sources else 0
    if not config.dataset:
        return plan(config, processes=processes, given=given)
    lengths = [len(e.input_ids) for e in context.task.train]
    return plan(config, sum(lengths), len(lengths), max(lengths), processes, given)


def _print_plan(found: Plan) -> None:
    console = Console()
    console.print("\n".join(found.coverage.lines()), markup=False, highlight=False, soft_wrap=True)
    shapes = Table("width d_in", "shared inputs", "layers", "whole basis each", title="Inputs")
    for d, groups, layers in widths(found.coverage.groups):
        shapes.add_row(str(d), str(groups), str(layers), _bytes(4 * d * d))
    console.print(shapes)
    stages = Table("stage", "memory", "disk", "time", title="Stages")
    for stage in found.stages:
        stages.add_row(stage.name, _bytes(stage.memory), _bytes(stage.disk), _durations(stage))
    console.print(stages)
    sizes = Table("directions", "bases", "training", title="Memory by spectrum.directions")
    for size in found.sizes:
        sizes.add_row(str(size.directions or "all"), _bytes(size.bases), _bytes(size.training))
    console.print(sizes)
    console.print(
        f"{len(found.coverage.layers)} layers read {len(found.coverage.groups)} inputs; "
        f"{found.trainable:,} of {found.parameters:,} parameters are trained."
    )
    own, advice = found.sizes[0], found.advice
    free = f"of {_bytes(found.free)} that are free"
    rows, tokens = found.batch
    console.print(
        f"A forward and backward pass over {rows} rows of {tokens} tokens takes "
        f"{_bytes(found.activations)}, part of what training takes."
    )
    if advice is None:
        console.print(
            f"Training needs {_bytes(own.training)} {free}: too much. Fewer rows at once "
            "(--training.per_device_train_batch_size, with more --training.gradient_accumulation_steps) or "
            "--training.gradient_checkpointing true take less."
        )
    elif advice is not own:
        console.print(
            f"Training needs {_bytes(own.training)} {free}; with --spectrum.directions "
            f"{advice.directions or 'all'} it needs {_bytes(advice.training)}."
        )
    else:
        console.print(f"Training takes {_bytes(own.training)} {free}.")
    console.print(
        "Times are estimates from a second of measuring here; expect a factor of three. Where there are two, "
        "sampling stops early when it has converged (sampling.tolerance), between the first check and "
        "sampling.num_sequences."
    )


def _say(what: RenderableType) -> None:
    """Print, once for all processes."""
    if distributed.rank() == 0:
        Console().print(what, markup=False, highlight=False, soft_wrap=isinstance(what, str))


def _print_report(report: dict[str, Any]) -> None:
    _say(summary(report))
    adapter = report["adapter"]
    _say(f"adapter: {adapter if os.path.exists(adapter) else 'folora export writes it'}")


def _bytes(count: float) -> str:
    return decimal(round(count))


def _durations(stage: StageEstimate) -> str:
    if stage.soonest is None or stage.seconds is None:
        return "not known"
    soonest, latest = _duration(stage.soonest), _duration(stage.seconds)
    return latest if soonest == latest else f"{soonest} to {latest}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _set_up_logging(verbose: bool) -> None:
    handler = RichHandler(console=STDERR, show_path=False, show_level=False)
    level = logging.INFO if distributed.rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)
    transformers_logging.disable_progress_bar()
    if not verbose:
        for library in ("httpx", "datasets", "transformers", "huggingface_hub", "accelerate"):
            logging.getLogger(library).setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        warnings.simplefilter("ignore", FutureWarning)
