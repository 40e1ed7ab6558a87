"""Run a recipe: ``python -m benchmarks.paper --recipe benchmarks/paper/recipes/llama2-7b-math.yaml``.

Arms that have a result are skipped, so that a comparison can be stopped and given again, and seeds can
be given to several machines. Whatever can be found out without loading the model is found out first.
"""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.paper.recipe import Recipe, chosen, read_recipe
from benchmarks.paper.rows import write_rows
from benchmarks.paper.sandbox import permission
from benchmarks.paper.scoring import check_code, scorer
from benchmarks.paper.trial import NEW_TOKENS, small
from folora.compare.comparison import Comparison
from folora.errors import FoLoraError
from folora.pipeline.run import Run
from folora.runtime.ownership import check_owned_folder, write_own

TRIAL = "trial"
"""What the list of a trial's folder says of it."""


def words(text: str) -> list[str]:
    """The parts between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def rates(text: str) -> list[float]:
    """Numbers between commas."""
    return [float(word) for word in words(text)]


def seeds(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [int(word) for word in words(text)]


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description="Run one of the paper's experiments."
    )
    found.add_argument("--recipe", type=Path, required=True, metavar="FILE")
    found.add_argument("--methods", type=words, metavar="A,B", help="of the recipe's; default: all")
    found.add_argument(
        "--learning-rates", type=rates, metavar="X,Y", help="of every method; default: the recipe's"
    )
    found.add_argument("--seeds", type=seeds, metavar="N,M", help="default: the recipe's")
    found.add_argument(
        "--benchmarks", type=words, metavar="A,B", help="of the recipe's; default: all"
    )
    found.add_argument("--model", help="a name or folder instead of the recipe's")
    found.add_argument("--output", type=Path, help="default: runs/paper/RECIPE")
    found.add_argument(
        "--allow-code",
        action="store_true",
        help="run generated programs, in a sandbox that does not stop every attack",
    )
    found.add_argument(
        "--dry-run",
        action="store_true",
        help="all steps on a tiny random model with a few rows, steps and documents",
    )
    return found


def wanted(options: argparse.Namespace) -> Recipe:
    """The recipe with what the command line changes. Raises ConfigError."""
    recipe = read_recipe(options.recipe)
    methods = recipe.methods
    if options.methods:
        methods = {m: methods[m] for m in chosen(options.methods, methods, "method")}
    if options.learning_rates:
        methods = dict.fromkeys(methods, options.learning_rates)
    base = {**recipe.base, **({"model": options.model} if options.model else {})}
    names = [*recipe.target, *recipe.kept]
    if options.benchmarks:
        names = chosen(options.benchmarks, dict.fromkeys(names), "benchmark")
    return replace(
        recipe,
        methods=methods,
        seeds=options.seeds or recipe.seeds,
        base=base,
        target=[name for name in recipe.target if name in names],
        kept=[name for name in recipe.kept if name in names],
    )


def run(recipe: Recipe, output: Path, command: str, *, allow_code: bool, trial: bool) -> None:
    """Run every arm of a recipe and print a line for each. Raises FoLoraError."""
    check_code(recipe, allow_code)
    if trial:
        check_owned_folder(output, TRIAL)
        shutil.rmtree(output, ignore_errors=True)  # a trial is for finding out, not for keeping
        note = "A trial. The next one deletes this folder.\n"
        write_own(output / "TRIAL.md", TRIAL, lambda file: file.write_text(note))
        recipe = small(recipe, output)
    rows = output / "rows.jsonl"
    write_rows(recipe.data, recipe.config.data.eval_rows, rows)
    stages = Run(recipe.config.changed({"dataset": str(rows), "output": str(output / "run")}))
    stages.check(needs_data=True)
    comparison = Comparison(
        stages,
        output / "results.jsonl",
        stage=recipe.stage,
        task=recipe.task,
        command=command,
        score=scorer(
            recipe,
            stages.context.tokenizer,
            allow_code=allow_code,
            max_new_tokens=NEW_TOKENS if trial else None,
        ),
        read_at=recipe.read_at,
    )
    with permission() if allow_code else nullcontext():
        for result in comparison.run_all(recipe.arms()):
            print(shown(result, recipe), flush=True)


def shown(result: dict[str, Any], recipe: Recipe) -> str:
    """An arm in one line: target and retained scores, and PEFT's forgetting."""
    last, base = result["readings"][-1], result["base"]
    parts = [f"{name} {_number(score)}" for name, score in {**last["task"], **last["kept"]}.items()]
    for name in recipe.passages:
        if last["kept"].get(name) and base["kept"].get(name):
            parts.append(
                f"{name} forgetting {math.log(base['kept'][name] / last['kept'][name]):.3f}"
            )
    diverged = ", diverged" if result["diverged"] else ""
    return f"{result['name']}: {', '.join(parts)}, KL {last['kl']}, {result['seconds']} s{diverged}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(given)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("folora").setLevel(logging.INFO)
    output = options.output or Path("runs/paper") / options.recipe.stem
    if options.dry_run:
        output = output / "dry-run"
    try:
        run(
            wanted(options),
            output,
            f"python -m benchmarks.paper {shlex.join(given)}",
            allow_code=options.allow_code,
            trial=options.dry_run,
        )
    except FoLoraError as error:
        print(f"folora: {error}", file=sys.stderr)
        return 2
    return 0


def _number(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


if __name__ == "__main__":
    sys.exit(main())
