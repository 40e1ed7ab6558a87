"""What the comparisons share: the arms of a plan, and what one task's run takes over from another's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from folora.comparison import Arm, arms
from folora.config import read_yaml
from folora.pipeline import SAMPLES, STATISTICS


def read_plan(path: Path) -> dict[str, Any]:
    """A plan; with ``extends: FILE`` it is what it changes of another plan beside it.

    A section (``base``, ``evaluation``) is changed name by name, anything else as a whole.
    """
    plan = read_yaml(path)
    other = plan.pop("extends", None)
    return _changed(read_plan(path.parent / other), plan) if other else plan


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(old)
    for name, value in new.items():
        section = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = _changed(found[name], value) if section else value
    return found


def planned(plan: Mapping[str, Any]) -> list[Arm]:
    """The arms of a plan's sweeps."""
    found: list[Arm] = []
    for sweep in plan["sweeps"]:
        knobs = sweep.get("knobs", {})
        found += arms(sweep["methods"], sweep["learning_rates"], **knobs)
    return found


def take_over(donor: Path | None, folder: Path) -> None:
    """Copy what belongs to the base model, not to the task: its samples and C_pre."""
    for part in (SAMPLES, f"{STATISTICS}/pre"):
        if donor and (donor / part).exists() and not (folder / part).exists():
            shutil.copytree(donor / part, folder / part)


def shown(result: Mapping[str, Any]) -> str:
    """One line on an arm that is done."""
    last = result["readings"][-1]
    kept = [value for value in last["kept"].values() if value is not None]
    mean = f"{sum(kept) / len(kept):.4f}" if kept else "-"
    task = "".join(f"{name} {value}, " for name, value in last["task"].items())
    return (
        f"{result['seed']} {result['task']} {result['name']}: {task}loss {last['task_loss']}, "
        f"kept {mean}, KL {last['kl']}, {result['seconds']} s"
    )
