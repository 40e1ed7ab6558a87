"""How much calibration text is needed: the measure against its definition, and its tables."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from scipy.linalg import eigh
from support.closeness import assert_near
from support.references import moment

from benchmarks import amounts
from benchmarks.amounts import growing, held, rows_table, text_table
from benchmarks.report.source import Source
from folora.calibration.calibration_set import CalibrationSet
from folora.errors import DataError
from folora.spectral.moments import Moments


def test_directions_are_scored_by_their_trace_quotient() -> None:
    a, b, task, other = (moment(12, rank=40, seed=seed) for seed in range(4))
    assert held((a, task), (a, task), 3) == pytest.approx(1.0)
    h, there = (m.double() + 1e-3 * m.diagonal().mean() * torch.eye(12).double() for m in (a, b))
    v = torch.from_numpy(eigh(task.numpy(), h.numpy())[1][:, -3:])
    best = eigh(other.numpy(), there.numpy())[0][-3:].sum()
    # The best basis of their span, independent of the basis that was used.
    worth = eigh((v.T @ other @ v).numpy(), (v.T @ there @ v).numpy())[0].sum()
    assert held((a, task), (b, other), 3) == pytest.approx(worth / best)
    assert 0 < worth / best < 1


def test_moments_of_growing_text_are_weighted_means() -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    parts = [x[:10], x[10:25], x[25:]]
    found = growing(Moments({"layer": p.T @ p / len(p)}, len(p)) for p in parts)
    assert [m.tokens for m in found] == [10, 25, 60]
    for m in found:
        whole = x[: m.tokens]
        assert_near(m.matrices["layer"], whole.T @ whole / m.tokens)


def test_tables_of_measurements(tmp_path: Path) -> None:
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
    table = text_table(source.amounts_of("tiny"))
    assert table.header == ("tokens per sequence", "256 tokens", "512 tokens")
    assert table.rows == (
        ("64", "0.600 / 0.300", "–"),
        ("128", "0.400 / 0.200", "0.800 / 0.400"),
    )
    assert "mean over a, b." in table.caption
    assert rows_table(found).rows == (("a", "0.160", "0.320"), ("b", "0.160", "0.320"))


def test_from_samples_and_rows_to_a_file(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LENGTHS", (4, 8)), ("SEQUENCES", (4, 8)), ("ROWS", (3, 6))):
        monkeypatch.setattr(amounts, name, value)
    monkeypatch.setattr(amounts, "WINDOWS", 4)
    monkeypatch.setenv("FOLORA_DATA_DIR", str(tmp_path))
    (tmp_path / "PROVENANCE.md").write_text("made up")
    rows = [
        {"question": f"{n} and {n} ?", "equation": f"x={n}+{n}", "answer": n} for n in range(40)
    ]
    texts = [{"text": "one and two and three " * 9}]
    for file, lines in (("mawps/train", rows), ("wikitext2/test", texts)):
        (tmp_path / file).parent.mkdir()
        with gzip.open(tmp_path / f"{file}.jsonl.gz", "wt") as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines))
    written = torch.randint(3, 40, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    CalibrationSet(written[:8], written[8:]).save(tmp_path / "run" / "1-samples" / "set")
    words = [
        "--run",
        tmp_path / "run",
        "--model",
        model_folder,
        "--output",
        tmp_path / "found.json",
    ]
    amounts.main([*map(str, words), "--targets", "mawps", "--directions", "2"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {(row["sequences"], row["length"], row["on"]) for row in found["text"]} == {
        (sequences, length, on)
        for sequences in (4, 8)
        for length in (4, 8)
        for on in ("own", "wikitext2")
    }
    assert {row["tokens"] for row in found["text"]} == {16, 32, 64}
    assert [row["rows"] for row in found["rows"]] == [3, 6]
    # The best directions score 1, and worse on text that they were not computed from.
    assert all(0 < row["share"] < 1 and row["cost"] > 1 for row in found["text"])
    assert all(0 < row["share"] < 1 for row in found["rows"])

    with pytest.raises(DataError, match="must have 100; targets of less than 12 rows: none"):
        monkeypatch.setattr(amounts, "SEQUENCES", (4, 100))
        amounts.main([*map(str, words), "--targets", "mawps"])
