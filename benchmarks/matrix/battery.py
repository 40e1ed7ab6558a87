"""What every stack of the matrix is asked to do, on tiny models; run by the stack's own Python.

    python -m benchmarks.matrix.battery RESULT.json

Writes a mapping from check to "passed" or to why it was not.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

import folora
from benchmarks.matrix import PACKAGES
from benchmarks.tiny import (
    MAKERS,
    make_llama,
    make_tokenizer,
    rows,
    tiny_config,
    tiny_task,
)

IDS = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(5))


def prepared(kind: str, init: str) -> Any:
    """A tiny prepared model."""
    config = tiny_config(method={"name": "folora", "init": init})
    return folora.prepare(MAKERS[kind](), make_tokenizer(), rows(), config)


def step(p: Any, steps: int = 3) -> None:
    """Train in a plain loop."""
    p.model.train()
    for _ in range(steps):
        p.optimizer.zero_grad()
        p.model(input_ids=IDS, labels=IDS).loss.backward()
        p.optimizer.step()
    p.model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of a fixed batch."""
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to rounding."""
    bound = 100 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def exact_trained_exported(kind: str, init: str) -> None:
    """Exact at step 0, trained, exported, and the same in stock PEFT."""
    before = logits(MAKERS[kind]())
    p = prepared(kind, init)
    assert torch.equal(logits(p.model), before), "not exact at step 0"
    assert p.meter.read(p.model).kl == 0
    step(p)
    after = logits(p.model)
    assert not torch.equal(after, before), "three steps changed nothing"
    assert p.meter.read(p.model).kl > 0
    with tempfile.TemporaryDirectory() as place:
        p.export(place)
        loaded = PeftModel.from_pretrained(MAKERS[kind](), place).eval()
        near(logits(loaded), after)
        near(logits(loaded.merge_and_unload()), after)


def plain_trainer() -> None:
    """transformers.Trainer with the prepared optimizer."""
    p = prepared("llama", "eigen")
    before = logits(p.model)
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place, max_steps=3, per_device_train_batch_size=1, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(
            p.model, arguments, train_dataset=p.train_dataset(), optimizers=(p.optimizer, None)
        ).train()
    assert torch.isfinite(logits(p.model)).all()
    assert not torch.equal(logits(p.model), before), "three steps changed nothing"


def run_and_resume(**changes: Any) -> None:
    """`folora run`; the same adapter again from a checkpoint in the middle."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        config = tiny_task(place).changed(changes)
        (place / "config.yaml").write_text(config.to_yaml())
        command = [sys.executable, "-m", "folora", "run", "--config", str(place / "config.yaml")]
        _call(command)
        run = place / "run"
        adapter = run / "5-adapter" / "adapter_model.safetensors"
        middle = run / "4-training" / "checkpoint-4" / "optimizer.pt"
        first, stamp = adapter.read_bytes(), middle.stat().st_mtime_ns
        loaded = PeftModel.from_pretrained(make_llama(), str(adapter.parent)).eval()
        assert not torch.equal(logits(loaded), logits(make_llama()))
        for name in ("4-training/result", "4-training/checkpoint-6", "5-adapter"):
            shutil.rmtree(run / name)
        (run / "report.json").unlink()
        _call(command)
        assert middle.stat().st_mtime_ns == stamp, "training began anew"
        assert adapter.read_bytes() == first, "another adapter after a resume"
        if (budget := config.budget) is not None:
            fit = json.loads((run / "report.json").read_text())["budget"][0]
            assert fit["scale"] < 1 and fit["kept"]["upper"] <= budget
            scaled = ["--adapter", str(adapter.parent), "--to", str(place / "scaled")]
            sampled = ["--sampling.min_new_tokens", "32", "--sampling.max_new_tokens", "40"]
            options = ["--device", "cpu", "--budget", str(budget / 2), *sampled]
            _call([sys.executable, "-m", "folora", "export", *scaled, *options])
            PeftModel.from_pretrained(make_llama(), str(place / "scaled"))


def _call(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


def version(package: str) -> str | None:
    """The installed version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def checks() -> dict[str, Callable[[], None]]:
    """By name."""
    found: dict[str, Callable[[], None]] = {}
    for kind, init in (("llama", "eigen"), ("llama", "null_space"), ("gpt2", "eigen"), ("gpt2", "null_space")):  # fmt: skip
        found[f"{kind}, {init}"] = lambda kind=kind, init=init: exact_trained_exported(kind, init)  # type: ignore[misc]
    found["Trainer"] = plain_trainer
    if version("trl"):
        found["run, resume"] = run_and_resume
        budget = {"budget": 1e-4, "anchor": 0.4, "training.learning_rate": 3e-2}
        found["budget, resume"] = partial(run_and_resume, **budget)
    return found


def main(file: str) -> None:
    """Run all checks and write their results."""
    torch.set_num_threads(1)
    outcomes: dict[str, str] = {}
    for name, check in checks().items():
        began = time.monotonic()
        try:
            check()
            outcomes[name] = "passed"
        except Exception as error:
            traceback.print_exc()
            outcomes[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {outcomes[name]} ({time.monotonic() - began:.0f} s)", flush=True)
    result = {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "checks": outcomes,
    }
    Path(file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
