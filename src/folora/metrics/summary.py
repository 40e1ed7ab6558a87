"""The summary of a run: a table of the measured quantities with definitions, and a verdict on the KL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

# Upper limits of the KL, in nats per token. Measured on SmolLM2-135M: bf16 instead of float32 gives .002
# by rounding alone; at .073 all known facts were retained; at .235 nine of ten were lost.
VERDICTS = (
    (0.003, "very small, like the effect of rounding to bf16: generated text is unchanged"),
    (0.02, "small: generated text hardly changes"),
    (0.1, "moderate: generated text changes; evaluate the abilities that must be retained"),
    (math.inf, "large: expect lost knowledge; lower training.learning_rate or training.max_steps"),
)

QUANTITIES = (
    (
        "task loss",
        "cross-entropy of a response token on held-out rows, in nats",
        "task_loss",
    ),
    (
        "KL to the base",
        "KL(base || adapted) per token on held-out calibration text, in nats",
        "kl",
    ),
    (
        "change in cross-entropy",
        "cross-entropy of the adapted minus the base model on that text, in nats per token",
        "ce_change",
    ),
    (
        "norm of the update",
        "Frobenius norm of the weight updates of all layers together",
        "frobenius",
    ),
    (
        "norm of the update in H",
        "the same, weighted by the layers' inputs on generated text",
        "h_norm",
    ),
)
"""Name, definition, and name in a report."""


def verdict(kl: float | None) -> str:
    """One sentence on a KL in nats per token; None or NaN if it could not be measured."""
    if kl is None or math.isnan(kl):
        return "KL to the base could not be measured: the adapted model's logits are not finite"
    words = next(words for limit, words in VERDICTS if kl < limit or limit == math.inf)
    return f"KL to the base is {words}"


def summary(report: Mapping[str, Any]) -> Group:
    """What `Run.report` returned, for a terminal."""
    table = Table(title=f"After {report['steps']} steps", show_lines=True)
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("adapted", justify="right")
    table.add_column("definition")
    base = {**report["base"], "frobenius": 0.0, "h_norm": 0.0}
    adapted = {**report["adapted"], **report["total_norm"]}
    for name, definition, key in QUANTITIES:
        table.add_row(name, _number(base[key]), _number(adapted[key]), definition)
        for source, kl in adapted.get("kl_by_source", {}).items() if key == "kl" else ():
            table.add_row(
                f"  on {source}",
                _number(0.0),
                _number(kl),
                f"the same on text of the source {source}",
            )
    lines: list[RenderableType] = [verdict(report["adapted"]["kl"]) + "."]
    if early := report.get("ended_early"):
        lines.append(f"Training ended early, {early}.")
    if fits := report.get("budget"):
        lines += [budget_verdict(fits[0]), budget_table(fits)]
    if report["base"]["task_loss"] is None:
        lines.append("No rows are held out (data.eval_rows), so there is no task loss.")
    return Group(table, *lines)


def budget_verdict(fit: Mapping[str, Any]) -> str:
    """One sentence on the budget, from the facts of a `BudgetFit`."""
    kept, scale = fit["kept"], fit["scale"]
    words = (
        f"Budget of {fit['budget']:g} nats per token kept: KL {_number(kept['mean'])}, with 95 % confidence at "
        f"most {_number(kept['upper'])}"
    )
    if sequences := kept.get("sequences"):
        words += f" on {sequences} held-out sequences"
    if sources := kept.get("by_source"):
        words += " (" + ", ".join(f"{name} {_number(kl)}" for name, kl in sources.items()) + ")"
    if scale == 1:
        return f"{words}. The adapter is as trained."
    if scale == 0:
        return f"{words}, but only without the adapter: train with a lower learning rate, or fewer steps."
    return f"{words}. The adapter is scaled by {scale:.3f} for it; as trained, KL is {_number(fit['trained']['mean'])}."


def budget_table(fits: Sequence[Mapping[str, Any]]) -> Table:
    """What the budget gave, and what half and twice as much would have given."""
    table = Table(title="Budget, by scaling the adapter after training")
    for column in ("budget", "scale", "KL", "at most (95 %)", "task loss"):
        table.add_column(column, justify="right")
    for fit in sorted(fits, key=lambda fit: fit["budget"]):
        kept = fit["kept"]
        numbers = (_number(v) for v in (kept["mean"], kept["upper"], fit["task_loss"]))
        table.add_row(f"{fit['budget']:g}", f"{fit['scale']:.3f}", *numbers)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 4) + 0.0:.4f}"  # adding 0 turns -0 into 0
