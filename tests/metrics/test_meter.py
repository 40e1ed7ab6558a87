"""The KL meter against a slow reference, one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.tiny import make_llama
from folora.data.contents import IGNORE, Example
from folora.errors import DataError
from folora.metrics.meter import Meter

SAMPLES = [[1, *range(4, 4 + n)] for n in (9, 3, 17)]
TASK = [
    Example([5, 6, 7, 8], [IGNORE, IGNORE, 7, 8]),
    Example([9, 10, 11], [IGNORE, 10, 11]),
]


def test_kl_matches_a_slow_reference() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(make_llama(), config).eval()
    kl = change = loss = 0.0
    tokens = answers = 0
    with torch.no_grad():
        for row in SAMPLES:
            ids = torch.tensor([row])
            q = model(ids).logits[0, :-1].double().log_softmax(-1)
            with model.disable_adapter():
                p = model(ids).logits[0, :-1].double().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            picked = ids[0, 1:, None]
            change += float((p.gather(1, picked) - q.gather(1, picked)).sum())
            tokens += len(row) - 1
        for e in TASK:
            q = model(torch.tensor([e.input_ids])).logits[0].double().log_softmax(-1)
            for i, label in enumerate(e.labels[1:]):
                if label != IGNORE:
                    loss -= float(q[i, label])
                    answers += 1
    model.train()
    for batch_size in (1, 2, 8):
        reading = Meter(SAMPLES, TASK, batch_size).read(model)
        assert reading.kl == pytest.approx(kl / tokens, rel=1e-4)
        assert reading.ce_change == pytest.approx(change / tokens, rel=1e-3)
        assert reading.task_loss == pytest.approx(loss / answers, rel=1e-5)
    assert model.training
    assert reading.kl > 0


def test_each_source_has_its_kl_and_together_they_give_the_total() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(make_llama(), config).eval()
    parts = {"bos": SAMPLES[:2], "chat": SAMPLES[2:]}
    whole, found = Meter(SAMPLES, []).read(model), Meter(parts, []).read(model)
    assert whole.kl_by_source == {}
    alone = {name: Meter(rows, []).read(model).kl for name, rows in parts.items()}
    assert found.kl_by_source == pytest.approx(alone)
    assert found.kl == pytest.approx(whole.kl)
    tokens = {name: sum(len(row) - 1 for row in rows) for name, rows in parts.items()}
    mean = sum(found.kl_by_source[n] * tokens[n] for n in parts) / sum(tokens.values())
    assert found.kl == pytest.approx(mean)
    assert Meter(parts, [], 1).num_batches == 3


def test_an_untrained_adapter_has_zero_kl_and_no_rows_give_nan() -> None:
    model = get_peft_model(make_llama(), LoraConfig(r=4, target_modules="all-linear"))
    reading = Meter(SAMPLES, []).read(model)
    assert (reading.kl, reading.ce_change) == (0.0, 0.0)
    assert math.isnan(reading.task_loss)
    with pytest.raises(DataError):
        Meter([], TASK)
