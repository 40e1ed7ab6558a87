"""How much text and how many rows second moments need: ``python -m benchmarks.amounts``.

Directions found on a part of the text or rows are evaluated on other text or rows, by their utility per unit
of forgetting relative to that of the best directions there. Nothing is trained, so that many amounts can be
tried; `benchmarks.compare` measures the effect of an amount on a trained adapter.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.real.targets import TARGETS, data_folder, target_rows
from folora.calibration.calibration_set import CalibrationSet
from folora.calibration.moments import second_moments
from folora.calibration.stopping import agreement, watched
from folora.compare.tables import NONE, Table
from folora.config import TAU, DataConfig, FoLoraConfig
from folora.data.contents import Example
from folora.data.files import load_rows
from folora.data.rows import batches, prepare_task, text_examples
from folora.errors import DataError
from folora.pipeline.context import coverage_of
from folora.pipeline.stages import Samples
from folora.runtime.artifacts import software_versions
from folora.runtime.loading import load_model, load_tokenizer
from folora.runtime.progress import progress
from folora.runtime.storage import write_text
from folora.spectral.eigenproblem import generalized_eigenbasis
from folora.spectral.moments import Moments

FORMAT = "amounts/1"
LENGTHS = (64, 128, 256, 512)  # tokens
SEQUENCES = (12, 24, 48, 96)
ROWS = (16, 32, 64, 128)
WINDOWS = 32  # of foreign text
BATCH = 8
ByInput = dict[str, Tensor]


def held(found_on: tuple[Tensor, Tensor], there: tuple[Tensor, Tensor], directions: int) -> float:
    """Utility of directions on other data, relative to that of the best directions there, in [0, 1].

    Args:
        found_on: C_pre and C_task that the directions are computed from, both (d, d).
        there: C_pre and C_task that they are evaluated on.
        directions: Number of directions.
    """
    v = generalized_eigenbasis(*found_on, directions=directions).basis
    pre, task = (matrix.double() for matrix in there)
    h = pre + TAU * pre.diagonal().mean() * torch.eye(len(pre), dtype=pre.dtype)
    worth = torch.linalg.solve(v.T @ h @ v, v.T @ task @ v).diagonal().sum()
    return float(worth / generalized_eigenbasis(*there, directions=directions).gamma.sum())


def growing(parts: Iterable[Moments]) -> list[Moments]:
    """Second moments of the first part, the first two together, and so on."""
    found: list[Moments] = []
    for part in parts:
        if found:
            before = found[-1]
            tokens = before.tokens + part.tokens
            part = Moments(
                {
                    name: (before.matrices[name] * before.tokens + matrix * part.tokens) / tokens
                    for name, matrix in part.matrices.items()
                },
                tokens,
            )
        found.append(part)
    return found


def foreign_text(tokenizer: Any) -> list[list[int]]:
    """Windows of WikiText-2's test articles, as long as the longest sequences."""
    articles = load_rows(str(data_folder() / "wikitext2" / "test.jsonl.gz"))
    ids = tokenizer("\n".join(article["text"] for article in articles))["input_ids"]
    return [ids[i * LENGTHS[-1] : (i + 1) * LENGTHS[-1]] for i in range(WINDOWS)]


def measured(run: Path, model_folder: Path, targets: Sequence[str], r: int) -> dict[str, Any]:
    """Relative utility by amount of text and of rows; see `main`."""
    config = FoLoraConfig(device="cpu", data=DataConfig(chat_template=False, max_length=256))
    model = load_model(config, str(model_folder))
    tokenizer = load_tokenizer(config, str(model_folder))
    samples = CalibrationSet.load(run / Samples.path)
    examples = {
        target: prepare_task(load_rows(target_rows(target)), tokenizer, config.data).train
        for target in targets
    }
    few = [target for target, rows in examples.items() if len(rows) < 2 * ROWS[-1]]
    if few or len(samples.calibration) < SEQUENCES[-1]:
        raise DataError(
            f"{run} has {len(samples.calibration)} samples for C_pre and must have {SEQUENCES[-1]}; "
            f"targets of less than {2 * ROWS[-1]} rows: {', '.join(few) or 'none'}"
        )
    groups = watched(coverage_of(model, config, samples.calibration[0][0]).groups)
    looks = len(LENGTHS) * len(SEQUENCES)
    with progress("amounts", looks + 2 + len(targets) * (len(ROWS) + 1 + looks)) as tick:

        def moments(examples: Sequence[Example]) -> Moments:
            tick()
            return second_moments(model, groups, batches(examples, BATCH))

        def grown(examples: Sequence[Example], counts: Sequence[int]) -> list[Moments]:
            return growing(moments(examples[a:b]) for a, b in pairwise((0, *counts)))

        own = {
            (sequences, length): found
            for length in LENGTHS
            for sequences, found in zip(
                SEQUENCES,
                grown(text_examples([row[:length] for row in samples.calibration]), SEQUENCES),
                strict=True,
            )
        }
        others = {
            "own": moments(text_examples(samples.held_out)).matrices,
            "wikitext2": moments(text_examples(foreign_text(tokenizer))).matrices,
        }
        whole = own[SEQUENCES[-1], LENGTHS[-1]].matrices
        by_text, by_rows = [], []
        for target, rows in examples.items():
            tasks = [m.matrices for m in grown(rows, ROWS)]
            judge = moments(rows[ROWS[-1] : 2 * ROWS[-1]]).matrices
            for count, task in zip(ROWS, tasks, strict=True):
                share = fmean(held((whole[n], task[n]), (whole[n], judge[n]), r) for n in whole)
                by_rows.append({"target": target, "rows": count, "share": share})
            for (sequences, length), found in own.items():
                tick()
                amount = {"sequences": sequences, "length": length, "tokens": found.tokens}
                for text, other in others.items():
                    worth = _worth(found.matrices, other, tasks[-1], r)
                    by_text.append({"target": target, **amount, "on": text, **worth})
    return {"directions": r, "inputs": len(groups), "text": by_text, "rows": by_rows}


def _worth(pre: ByInput, other: ByInput, task: ByInput, r: int) -> dict[str, float]:
    """Relative utility and cost of directions on other text, mean over the inputs."""
    return {
        "share": fmean(held((pre[n], task[n]), (other[n], task[n]), r) for n in pre),
        "cost": fmean(agreement(pre[n], other[n], task[n], directions=r).penalty for n in pre),
    }


def text_table(found: Mapping[str, Any]) -> Table:
    """Relative utility by length of the sequences and number of tokens, mean over the targets."""
    cells: dict[tuple[int, int], dict[str, list[float]]] = {}
    for row in found["text"]:
        cell = cells.setdefault((row["length"], row["sequences"] * row["length"]), {})
        cell.setdefault(row["on"], []).append(row["share"])
    amounts = sorted({tokens for _, tokens in cells})

    def shown(length: int, tokens: int) -> str:
        shares = cells.get((length, tokens), {}).values()
        return " / ".join(f"{fmean(share):.3f}" for share in shares) or NONE

    rows = tuple(
        (str(length), *(shown(length, tokens) for tokens in amounts))
        for length in sorted({length for length, _ in cells})
    )
    return Table(
        ("tokens per sequence", *(f"{tokens:,} tokens" for tokens in amounts)),
        rows,
        f"{found['model']}, {found['inputs']} shared inputs, {found['directions']} eigenvectors: their utility as a share "
        "of that of the best directions, on other self-generated text / on WikiText-2, mean over "
        f"{', '.join(_targets(found['text']))}.",
    )


def rows_table(found: Mapping[str, Any]) -> Table:
    """Relative utility by target and number of its rows."""
    share = {(row["target"], row["rows"]): row["share"] for row in found["rows"]}
    counts = sorted({count for _, count in share})
    return Table(
        ("target", *(f"{count} rows" for count in counts)),
        tuple(
            (target, *(f"{share[target, count]:.3f}" for count in counts))
            for target in _targets(found["rows"])
        ),
        f"{found['model']}: utility of the eigenvectors on {ROWS[-1]} other rows, as a share of that of the best directions.",
    )


def _targets(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["target"] for row in rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description="Measure how much text and how many rows suffice.")
    parser.add_argument(
        "--run", type=Path, required=True, help="a folora run's folder, with samples"
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--directions", type=int, default=16)
    parser.add_argument("--output", type=Path, required=True, help="the .json to write")
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = {
        "format": FORMAT,
        "command": f"python -m benchmarks.amounts {shlex.join(given)}",
        "model": options.model.name,
        "versions": software_versions(),
        **measured(options.run, options.model, options.targets, options.directions),
    }
    write_text(options.output, json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
