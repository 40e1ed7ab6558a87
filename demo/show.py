"""The demo's result as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from demo.scores import PROMPTS, Scores
from folora.compare.tables import Table

ROWS = (
    ("task loss (nats per token)", "task_loss", "{:.3f}"),
    ("queries right (held-out tables)", "task_accuracy", "{:.1%}"),
    ("known facts retained (of 400)", "facts_accuracy", "{:.1%}"),
    ("log-probability of a fact", "facts_log_probability", "{:.2f}"),
    ("loss on plain English (nats per token)", "text_loss", "{:.3f}"),
    ("KL to the base (nats per token)", "kl", "{:.4f}"),
)
PANELS = (
    ("learned: queries right", "task_accuracy", "{:.0%}"),
    ("kept: log-probability of a fact", "facts_log_probability", "{:.2f}"),
    ("kept: loss on plain English (less is better)", "text_loss", "{:.2f}"),
)
COLORS = ("#9aa0a6", "#d9803b", "#e8b98f", "#2b6cb0")


def table(scores: Mapping[str, Scores], caption: str) -> Table:
    """A column for each model, with its scores and its answer to each prompt."""
    models = scores.values()
    numbers = (
        (title, *(form.format(getattr(s, name)) for s in models)) for title, name, form in ROWS
    )
    texts = ((f'"{p}"', *(s.answers[i] for s in models)) for i, p in enumerate(PROMPTS))
    return Table(("", *scores), (*numbers, *texts), caption)


def picture(scores: Mapping[str, Scores], path: Path) -> None:
    """Write three bar charts: what is learned, and twice what is kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 3.2), constrained_layout=True)
    for axis, (title, name, form) in zip(axes, PANELS, strict=True):
        values = [getattr(s, name) for s in scores.values()]
        bars = axis.bar(list(scores), values, color=COLORS)
        axis.bar_label(bars, [form.format(value) for value in values], padding=2)
        axis.set_title(title, fontsize=10)
        axis.tick_params("x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    figure.savefig(path, format="png", dpi=150)
    pyplot.close(figure)
