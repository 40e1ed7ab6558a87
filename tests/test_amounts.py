"""How much text is enough: the measure against its definition, and figures on their way into tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scipy.linalg import eigh
from test_spectrum import moment

from benchmarks.amounts import growing, held, rows_table, text_table
from benchmarks.source import Source
from folora.activations import Moments


def test_directions_are_worth_their_trace_quotient() -> None:
    a, b, task, other = (moment(12, rank=40, seed=seed) for seed in range(4))
    assert held((a, task), (a, task), 3) == pytest.approx(1.0)
    h, there = (m.double() + 1e-3 * m.diagonal().mean() * torch.eye(12) for m in (a, b))
    v = torch.from_numpy(eigh(task.numpy(), h.numpy())[1][:, -3:])
    best = eigh(other.numpy(), there.numpy())[0][-3:].sum()
    # The best basis of their span, whatever basis it was found in.
    worth = eigh((v.T @ other @ v).numpy(), (v.T @ there @ v).numpy())[0].sum()
    assert held((a, task), (b, other), 3) == pytest.approx(worth / best)
    assert 0 < worth / best < 1


def test_text_adds_up() -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    parts = [x[:10], x[10:25], x[25:]]
    found = growing(Moments({"layer": p.T @ p / len(p)}, len(p)) for p in parts)
    assert [m.tokens for m in found] == [10, 25, 60]
    for m in found:
        whole = x[: m.tokens]
        assert torch.allclose(m.matrices["layer"], whole.T @ whole / m.tokens, atol=1e-6)


def test_tables_of_what_was_measured(tmp_path: Path) -> None:
    def row(target: str, sequences: int, length: int, share: float) -> list[dict[str, object]]:
        amount = {"target": target, "sequences": sequences, "length": length}
        return [
            amount | {"on": "own", "share": share},
            amount | {"on": "wikitext2", "share": share / 2},
        ]

    found = {
        "model": "tiny", "inputs": 8, "directions": 16,
        "text": [*row("a", 4, 64, 0.5), *row("b", 4, 64, 0.7), *row("a", 2, 128, 0.4), *row("b", 2, 128, 0.4),
                 *row("a", 4, 128, 0.8), *row("b", 4, 128, 0.8)],
        "rows": [{"target": t, "rows": n, "share": n / 100} for t in "ab" for n in (16, 32)],
    }  # fmt: skip
    (tmp_path / "amounts").mkdir()
    (tmp_path / "amounts" / "tiny.json").write_text(json.dumps(found))
    source = Source.load(tmp_path, tmp_path, tmp_path / "none.json")
    table = text_table(source.judged("tiny"))
    assert table.header == ("tokens a sequence", "256 in all", "512 in all")
    assert table.rows == (
        ("64", "0.600 / 0.300", "–"),
        ("128", "0.400 / 0.200", "0.800 / 0.400"),
    )
    assert "the mean over a, b." in table.caption
    assert rows_table(found).rows == (("a", "0.160", "0.320"), ("b", "0.160", "0.320"))
