"""A process that knows a folder only: it loads model, adapter, moments and spectrum, trains, and saves the adapter.

Run as ``python second_process.py FOLDER THREADS``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import folora

LEARNING_RATE, STEPS = 1e-2, 3
IDS = torch.arange(3, 35).reshape(2, 16)


def trained(model: PeftModel, spectrum: folora.Spectrum) -> PeftModel:
    """The adapter after a few steps of a new optimizer."""
    optimizer = folora.optimizer(model, spectrum, LEARNING_RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


def main(folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    keep, task = (folora.Moments.load(folder / name) for name in ("keep", "task"))
    spectrum = folora.Spectrum.load(folder / "spectrum")
    again = folora.solve(keep, task, null_rank=4)
    assert again.groups == spectrum.groups
    for a, b in zip(again, spectrum, strict=True):
        assert torch.equal(a.basis, b.basis) and torch.equal(a.null_basis, b.null_basis)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, str(folder / "fresh"), is_trainable=True)
    trained(model, spectrum).save_pretrained(str(folder / "second"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
