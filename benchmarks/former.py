"""Calibration text that includes earlier tasks: their prompts, answered by the model that is trained next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.readings import prompt_of
from folora.calibration.base_file import write_base_file
from folora.calibration.moments import measure
from folora.data.rows import text_examples
from folora.pipeline.run import Run
from folora.runtime.contexts import evaluating

FORMER = "former"
"""The ``source`` of a plan's ``calibration``; its ``count`` is that of prompts of each earlier task."""


def with_former(run: Run, earlier: Sequence[Run], count: int) -> Run:
    """The run with answered prompts of earlier tasks added to its own samples, by a base file in its folder.

    Args:
        run: On the model that is trained next.
        earlier: Runs of the tasks that it has learned, for the prompts of their training rows.
        count: Rows of each.
    """
    path = run.folder / "former.safetensors"
    if not path.exists():
        context, samples = run.context, run.sample()
        rows = [row for other in earlier for row in other.context.task.train[:count]]
        own, sources = len(samples.calibration), samples.sources
        texts = [*samples.calibration, *(answered(run, prompt_of(row)) for row in rows)]
        if sources:  # in the order of all sequences, held-out ones last
            sources = [*sources[:own], *[FORMER] * len(rows), *sources[own:]]
        moments = measure(
            context.model, context.groups, text_examples(texts), run.config.statistics, "C_pre"
        )
        extended = replace(samples, calibration=texts, sources=sources)
        write_base_file(path, extended, moments, context.facts)
    # The file has one source more than the config of the run asks for.
    return Run(run.config.changed({"base": str(path), "sampling.sources": None}))


def answered(run: Run, prompt: list[int]) -> list[int]:
    """A prompt with the model's greedy answer, up to EOS or ``sampling.max_new_tokens``."""
    model: Any = run.context.model
    ids = torch.tensor([prompt], device=model.device)
    with evaluating(model), torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=run.config.sampling.max_new_tokens,
            eos_token_id=run.context.tokenizer.eos_token_id,
            pad_token_id=run.context.tokenizer.pad_token_id,
        )
    return [int(token) for token in found[0]]
