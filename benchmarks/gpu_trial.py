"""The inputs of `benchmarks.gpu` in small: tiny random models, few rows, two steps and one question of each kind."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import yaml

from benchmarks.plan import Plan
from benchmarks.real.targets import data_folder
from benchmarks.tiny import CHAT, make_llama, make_tokenizer

ROWS = 48  # of every data set
FOLDERS = {"smollm2": "smollm2-135m-instruct", "qwen2.5-coder": "qwen2.5-coder-0.5b-instruct"}
"""Where `benchmarks.models` looks for a model."""
TOOLS = "{% if tools %}{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}"
SHORT = {
    "device": "cpu",
    "sampling.num_sequences": 36,
    "sampling.min_new_tokens": 32,
    "sampling.max_new_tokens": 32,
    "sampling.batch_size": 32,
    "statistics.task_examples": 4,
    "data.max_length": 256,  # characters are tokens here
    "data.eval_rows": 4,
    "training.max_steps": 2,
    "training.bf16": False,
    "adapter.r": 4,
}


def shortened(plans: Sequence[Path], place: Path) -> dict[str, str]:
    """Write short plans, models and data into ``plans``, ``models`` and ``data`` of a folder.

    Returns:
        Environment variables with which the commands read them.

    Raises:
        DataError: ``FOLORA_DATA_DIR`` does not name the data sets.
    """
    for path in plans:
        plan = Plan.load(path)
        short = {
            "include": [str(path.resolve())],
            "base": SHORT,
            "seeds": plan.seeds[:1],
            "scales": plan.scales[:1],
            "sweeps": [
                asdict(sweep)
                for sweep in plan.sweeps
                if sweep.learning_rates == plan.sweeps[0].learning_rates
            ],  # other rates take the same way
            "evaluation": {"documents": dict.fromkeys(plan.evaluation["documents"], 1)},
        }
        (place / "plans").mkdir(parents=True, exist_ok=True)
        (place / "plans" / path.name).write_text(yaml.safe_dump(short))
        model = place / "models" / FOLDERS[plan.model]
        if not model.exists():
            tokenizer = make_tokenizer(chat=True)
            tokenizer.chat_template = TOOLS + CHAT
            tokenizer.save_pretrained(model)
            make_llama(max_position_embeddings=4096).save_pretrained(model)
    source = data_folder()
    for file in source.rglob("*.jsonl.gz"):
        target = place / "data" / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(file, "rt", encoding="utf-8") as rows, gzip.open(target, "wt", encoding="utf-8") as few:  # fmt: skip
            few.writelines(islice(rows, ROWS))
    shutil.copyfile(source / "PROVENANCE.md", place / "data" / "PROVENANCE.md")
    return {"FOLORA_DATA_DIR": str(place / "data")}
