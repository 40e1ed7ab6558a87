"""Updates that read given directions and write random ones, scaled to a KL."""

from __future__ import annotations

import math

import pytest
import torch

import folora
from benchmarks.random_updates import CLOSE, fill, mean_kl, scale_to
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config
from folora.adapters.adapter import lora_factors
from folora.data.rows import text_examples


@pytest.mark.parametrize("level", [1e-3, 0.2])
def test_a_random_update_is_scaled_to_its_kl(level: float) -> None:
    prepared = folora.prepare(make_llama(), make_tokenizer(), rows(), tiny_config())
    model, held_out = prepared.model, prepared.task.held_out
    texts = text_examples(prepared.samples.held_out)
    before = {name: a.clone() for name, (a, *_) in lora_factors(model).items()}
    assert mean_kl(model, texts, 4) == 0
    fill(model, torch.Generator().manual_seed(0))
    b = torch.cat(
        [b.detach().flatten() * math.sqrt(len(b)) for _, b, *_ in lora_factors(model).values()]
    )
    assert float(b.std()) == pytest.approx(1, rel=0.1) and abs(float(b.mean())) < 0.1  # fmt: skip
    found = scale_to(model, held_out, level, 4)
    assert found == pytest.approx(level, rel=CLOSE)
    assert found == pytest.approx(mean_kl(model, held_out, 2), rel=1e-4)
    assert mean_kl(model, texts, 4) == pytest.approx(prepared.meter.read(model).kl, rel=1e-5)
    assert all(torch.equal(a, before[name]) for name, (a, *_) in lora_factors(model).items())
