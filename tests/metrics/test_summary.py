"""The table at the end of a run explains its measurements in words."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from folora.metrics.summary import QUANTITIES, VERDICTS, summary, verdict


def report(kl: float | None = 0.0042, task_loss: float | None = 0.346) -> dict[str, Any]:
    return {
        "steps": 100,
        "base": {"kl": 0.0, "ce_change": 0.0, "task_loss": task_loss and 2.11},
        "adapted": {"kl": kl, "ce_change": 0.001, "task_loss": task_loss},
        "total_norm": {"frobenius": 1.5, "h_norm": 0.2},
        "adapter": "runs/first/5-adapter",
    }


def shown(values: dict[str, Any]) -> str:
    written = io.StringIO()
    Console(file=written, width=200).print(summary(values), markup=False, highlight=False)
    return written.getvalue()


@pytest.mark.parametrize(
    ("kl", "word"),
    [(0.0, "very small"), (0.0029, "very small"), (0.003, "small:"), (0.0199, "small:"),
     (0.02, "moderate"), (0.0999, "moderate"), (0.1, "large"), (9.0, "large")],
)  # fmt: skip
def test_the_verdict_follows_from_the_kl(kl: float, word: str) -> None:
    assert f"KL to the base is {word}" in verdict(kl)
    assert verdict(kl) in shown(report(kl))


def test_verdict_thresholds_increase() -> None:
    limits = [limit for limit, _ in VERDICTS]
    assert limits == sorted(limits) and limits[-1] == float("inf")


@pytest.mark.parametrize("kl", [None, float("nan")])
def test_a_kl_that_was_not_measured_is_not_called_small(kl: float | None) -> None:
    assert "could not be measured" in verdict(kl)


def test_every_quantity_of_the_table_is_defined() -> None:
    text = shown(report())
    for name, definition, _ in QUANTITIES:
        (line,) = (line for line in text.splitlines() if re.match(rf"│ {name} +│", line))
        assert definition in line
    assert "2.1100" in text and "0.3460" in text and "0.0042" in text


def test_missing_held_out_rows_are_explained() -> None:
    assert "data.eval_rows" in shown(report(task_loss=None))
    assert "data.eval_rows" not in shown(report())


def test_an_early_end_is_stated_with_its_step_and_reason() -> None:
    early = "after step 65 of 100: the budget binds"
    assert f"Training ended early, {early}." in shown({**report(), "ended_early": early})
    assert "ended early" not in shown(report())
