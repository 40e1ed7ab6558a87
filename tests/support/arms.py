"""A file of synthetic results: arms with a few readings each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from folora.compare.results import Result, ResultFile, load_results

ARMS = "arms.jsonl"

Readings = list[tuple[float, float, float]]  # task accuracy, accuracy retained, KL


def reading(step: int, task: float, kept: float, kl: float, scored: bool = True) -> dict[str, Any]:
    """Loss is 2 (1 - task); the norms grow with the step."""
    return {
        "step": step,
        "task_loss": 2.0 * (1.0 - task),
        "kl": kl,
        "ce_change": kl / 2,
        "frobenius": step / 10,
        "h_norm": step / 100,
        "task": {"accuracy": task} if scored else {},
        "kept": {"city": kept - 0.05, "copy": kept + 0.05} if scored else {},
    }


def write(
    folder: Path,
    method: str,
    seed: int,
    numbers: Readings,
    task: str = "shift",
    scored: bool = True,
    name: str = "",
    **changes: Any,
) -> Path:
    """Add one result; the base has task score 0.1, kept 0.95."""
    values = {
        "format": 2,
        "stage": f"world-{seed}/{task}",
        "task": task,
        "seed": seed,
        "name": f"{method}{name}",
        "method": method,
        "title": method.upper(),
        "changes": {"training.learning_rate": 1e-3},
        "command": "python -m made.up",
        "config": {"adapter": {"r": 4}},
        "versions": {"torch": "2"},
        "seconds": 8.1,
        "base": reading(0, 0.1, 0.95, 0.0, scored),
        "readings": [
            reading(25 * (i + 1), *three, scored=scored) for i, three in enumerate(numbers)
        ],
        "diverged": False,
        **changes,
    }
    ResultFile(folder / ARMS).add(values)
    return folder / ARMS


def load(folder: Path) -> list[Result]:
    return load_results(folder / ARMS)


def write_all(folder: Path, scored: bool = True, task: str = "shift") -> None:
    """Two methods with three seeds; folora has two arms per seed."""
    for seed in range(3):
        d = 0.01 * seed
        write(folder, "folora", seed, [(0.5, 0.9 - d, 0.01), (0.9, 0.8 - d, 0.04)], task, scored)
        other = [(0.7, 0.90, 0.02 + d), (1.0, 0.7, 0.3)]
        write(folder, "folora", seed, other, task, scored, name="-b")
        lora = [(0.6, 0.7 - 2 * d, 0.1), (0.95, 0.5 - 3 * d, 0.5 + d)]
        write(folder, "lora", seed, lora, task, scored)
