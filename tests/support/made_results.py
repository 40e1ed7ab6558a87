"""Synthetic results of plans, a template of their blocks, and numbers computed independently."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import stats

from benchmarks.report.page import render
from benchmarks.report.source import Source
from folora.compare.results import ResultFile
from folora.methods import METHODS
from folora.pipeline.stages import KeepMoments, TaskMoments
from folora.spectral.groups import InputGroup
from folora.spectral.moments import Moments

RATES = (1e-3, 3e-3, 1e-2)
# Accuracy that a method retains after the last step, at seed 0 and all rates but the highest.
KEPT = {
    "folora": 0.8, "folora-null": 0.7, "lora": 0.3, "milora": 0.2, "gate-off": 0.6, "eigen-frozen": 0.4,
    "lora-kl": 0.5,
}  # fmt: skip
PLAN = {"model": "world", "runs": "r", "base": {}, "tasks": ["shift"], "seeds": [0, 1]}
MORE_SEEDS = {
    **PLAN,
    "seeds": [3, 4],
    "sweeps": [{"methods": ["folora", "gate-off"], "learning_rates": list(RATES[:2])}],
}
PLANS: dict[str, dict[str, Any]] = {
    "world_methods": {
        "seeds": [0, 1, 2],
        "sweeps": [
            {"methods": ["folora", "folora-null", "lora", "milora"], "learning_rates": RATES}
        ],
    },
    "world_ablation": {
        "sweeps": [
            {"methods": ["gate-off"], "learning_rates": RATES[:2]},
            {"methods": ["eigen-frozen"], "learning_rates": RATES[1:]},
        ]
    },
    "world_complements": {"sweeps": [{"methods": ["lora-kl"], "learning_rates": RATES[:2]}]},
    "world_knobs": {
        "sweeps": [
            {"methods": ["folora"], "learning_rates": RATES[:2], "knobs": {name: values}}
            for name, values in (("spectrum.tau", [1e-1, 1e-5]), ("spectrum.s_min", [0.0]))
        ]
    },
    "world_calibration": {
        "calibration": [
            {"source": "self", "count": 16},
            {"source": "self", "count": 256},
            {"source": "narrow", "count": 256},
        ],
        "sweeps": [{"methods": ["folora", "folora-null"], "learning_rates": [3e-3]}],
    },
}
TEMPLATE = """# Page

{{ runs }}
## Methods
{{ methods shift }}
## Norms
{{ norms shift }}
## Ablation
{{ variants world_ablation shift }}
## Complements
{{variants world_complements shift}}
## Knobs
{{ knobs folora }}
## Calibration
{{ calibration }}
## Spectrum
{{ spectra }}
"""


def final(method: str, seed: int, rate: float, change: float = 0.0) -> float:
    """Accuracy retained after the last step; more at the highest rate, with less variance over seeds for folora."""
    spread = 0.01 if method == "folora" else 0.02
    return KEPT[method] - spread * seed + (0.1 if rate == RATES[-1] else 0.0) + change


def reading(step: int, task: float, kept: float, rate: float) -> dict[str, Any]:
    """Norms grow with step and rate; KL is a tenth of the lost accuracy."""
    return {
        "step": step,
        "task_loss": 1 - task,
        "kl": (1 - kept) / 10,
        "ce_change": 0.0,
        "frobenius": 1000 * rate * step,
        "h_norm": 10 * rate * step,
        "task": {"accuracy": task},
        "kept": {"city": kept - 0.05, "copy": kept + 0.05},
    }


def write_arm(
    folder: Path,
    plan: str,
    method: str,
    seed: int,
    rate: float,
    change: float = 0.0,
    knobs: dict[str, float] | None = None,
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Add one result; the task score after 100 steps is 1, at the lowest rate .6."""
    kept, reached = final(method, seed, rate, change), 0.6 if rate == RATES[0] else 1.0
    changes = {"training.learning_rate": rate, **(knobs or {})}
    values = {
        "format": 2,
        "stage": f"world-{seed}",
        "task": "shift",
        "seed": seed,
        "name": "--".join(
            [method, *(f"{k}={v}" for k, v in (changes | (calibration or {})).items())]
        ),
        "method": method,
        "title": METHODS[method].title,
        "changes": changes,
        "calibration": calibration or {},
        "command": f"python -m made.up --plan {plan}.yaml --seeds {seed} 7",
        "config": {"adapter.r": 8},
        "versions": {"torch": "2", "peft": "1"},
        "seconds": 360.0,
        "base": {**reading(0, 0.0, 1.0, rate), "kept": {"city": 1.0, "copy": 1.0}},
        "readings": [reading(50, 0.5, kept + 0.1, rate), reading(100, reached, kept, rate)],
        "diverged": False,
    }
    ResultFile(folder / f"{plan}.jsonl").add(values)
    return values


def write_plans(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, plan in PLANS.items():
        values = json.loads(json.dumps({**PLAN, **plan}))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))


def write_results(folder: Path) -> None:
    for seed in range(3):
        for method in ("folora", "folora-null", "lora", "milora"):
            for rate in RATES:
                write_arm(folder, "world_methods", method, seed, rate)
    for seed in range(2):
        for rate in RATES[1:]:
            write_arm(folder, "world_ablation", "eigen-frozen", seed, rate)
        for rate in RATES[:2]:
            write_arm(folder, "world_ablation", "gate-off", seed, rate)
            write_arm(folder, "world_complements", "lora-kl", seed, rate)
            for knob, value, change in (("tau", 1e-1, -0.1), ("tau", 1e-5, -0.3), ("s_min", 0.0, 0.0)):  # fmt: skip
                knobs = {f"spectrum.{knob}": value}
                write_arm(folder, "world_knobs", "folora", seed, rate, change * (1 + seed), knobs)
        for method in ("folora", "folora-null"):
            for source, count, change in (("self", 16, -0.2), ("self", 256, 0.0), ("narrow", 256, -0.5)):  # fmt: skip
                on = {"source": source, "count": count}
                write_arm(folder, "world_calibration", method, seed, 3e-3, change, None, on)


def moments(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A run folder's moments with two groups, of which the second has diagonal matrices only."""
    c_pre, c_task = np.diag([3.0, 2.0, 1.0]), np.array([[2.0, 1, 0], [1, 2, 0], [0, 0, 1]])
    groups = tuple(InputGroup((name,), 3) for name in "ab")
    for stage, matrix in ((KeepMoments, c_pre), (TaskMoments, c_task)):
        whole = torch.from_numpy(matrix).float()
        Moments({"a": whole, "b": whole.diag().diag()}, 1, groups).save(folder / stage.path)
    return c_pre, c_task


def source(folder: Path) -> Source:
    return Source.load(folder / "results", folder / "plans", folder / "demo.json")


def tables(text: str) -> list[dict[str, dict[str, str]]]:
    """Tables of a page, each as row -> column -> cell; a number is added to repeated titles."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[c.strip() for c in row.strip("|").split(" | ")] for row in lines.splitlines()]
        header = [f"{h}{rows[0][:i].count(h) or ''}" for i, h in enumerate(rows[0])]
        found.append({row[0]: dict(zip(header, row, strict=True)) for row in rows[2:]})
    return found


def page(folder: Path, block: str) -> str:
    return render(f"{{{{ {block} }}}}", source(folder)).text


def stated(values: list[float], digits: int = 3, sign: str = "-") -> str:
    if np.ptp(values) < 1e-12:
        return f"{np.mean(values):{sign}.{digits}f} ± {0:.{digits}f}"
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return f"{np.mean(values):{sign}.{digits}f} ± {(high - low) / 2:.{digits}f}"
