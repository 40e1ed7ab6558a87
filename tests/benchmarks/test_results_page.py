"""Made-up results of every plan, and the page that they give; the committed page is up to date."""

from __future__ import annotations

import json
import math
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from scipy import stats

from benchmarks.report.__main__ import main
from benchmarks.report.page import TEMPLATES, pages, render
from benchmarks.report.source import Source
from benchmarks.spectra import main as spectra_main
from folora.compare.methods import METHODS
from folora.compare.results import ResultFile
from folora.config import S_MIN, TAU
from folora.errors import ConfigError, NumericsError
from folora.runtime.artifacts import write_artifact
from folora.spectral.eigenproblem import off_diagonal_mass

ROOT = Path(__file__).parents[2]
RATES = (1e-3, 3e-3, 1e-2)
# What a method keeps in the end, at seed 0 and all rates but the highest.
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
    """Kept after the last step; the highest rate keeps more, and folora differs less by seed."""
    spread = 0.01 if method == "folora" else 0.02
    return KEPT[method] - spread * seed + (0.1 if rate == RATES[-1] else 0.0) + change


def reading(step: int, task: float, kept: float, rate: float) -> dict[str, Any]:
    """Norms grow with step and rate; KL is what was not kept, over ten."""
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
    """Add one result; a model learns all after 100 steps, at the lowest rate but .6 of it."""
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
    """A run folder's statistics with two groups, of which the second is diagonal throughout."""
    c_pre, c_task = np.diag([3.0, 2.0, 1.0]), np.array([[2.0, 1, 0], [1, 2, 0], [0, 0, 1]])
    for part, matrix in (("pre", c_pre), ("task", c_task)):
        tensors = {"a": torch.from_numpy(matrix), "b": torch.from_numpy(np.diag(np.diag(matrix)))}
        write_artifact(folder / "2-statistics" / part, f"statistics_{part}", tensors, {})
    return c_pre, c_task


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Plans, results and a template with every block."""
    write_plans(tmp_path / "plans")
    write_results(tmp_path / "results")
    moments(tmp_path / "run")
    output = tmp_path / "results" / "spectra" / "tiny.json"
    spectra_main(["--run", str(tmp_path / "run"), "--model", "tiny", "--task", "shift", "--output", str(output)])  # fmt: skip
    (tmp_path / "template.md").write_text(TEMPLATE)
    return tmp_path


def source(folder: Path) -> Source:
    return Source.load(folder / "results", folder / "plans", folder / "demo.json")


def tables(text: str) -> list[dict[str, dict[str, str]]]:
    """Tables of a page, each as row -> column -> cell; a repeated title has its number added."""
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


def test_runs(made: Path) -> None:
    text = page(made, "runs")
    (table,) = tables(text)
    assert table["world_methods"] == {
        "plan": "world_methods", "tasks": "shift", "seeds": "0, 1, 2", "arms": "36 of 36",
        "hours": "3.6",
    }  # fmt: skip
    assert table["world_calibration"]["arms"] == "12 of 12"
    typed = [line for line in text.splitlines() if line.startswith("python")]
    assert typed == [f"python -m made.up --plan {plan}.yaml" for plan in sorted(PLANS)]
    assert "Versions: torch 2, peft 1." in text


def test_methods(made: Path) -> None:
    text = page(made, "methods shift")
    (table,) = tables(text)
    assert list(table) == ["folora", "folora, null-space start", "LoRA", "MiLoRA"]
    lora = [final("lora", seed, 1e-2) for seed in range(3)]  # the highest rate keeps the most
    folora = [final("folora", seed, 1e-2) for seed in range(3)]
    assert table["LoRA"]["kept at matched task"] == stated(lora)
    difference = stated([a - b for a, b in zip(lora, folora, strict=True)], sign="+")
    assert table["LoRA"]["minus folora"] == f"{difference} *"
    assert table["LoRA"]["KL at matched task"] == stated([(1 - k) / 10 for k in lora], 4)
    assert "Incomplete" not in text


def test_norms(made: Path) -> None:
    frobenius, h_norm = tables(page(made, "norms shift"))
    # At least half of the best task score, 1: all readings of folora's three seeds.
    sizes = [1000 * rate * step for rate in RATES for step in (50, 100)] * 3
    levels = [float(f"{q:.2g}") for q in np.quantile(sizes, (0.25, 0.5, 0.75))]
    titles = [title for title in frobenius["LoRA"] if title.startswith("F")]
    assert titles == [f"F = {level:g}" for level in levels]

    def kept(method: str, seed: int, level: float) -> float:
        """Mean over the arms that pass the level, on a straight line in its logarithm."""
        arms = [
            np.interp(
                math.log(level),
                [math.log(50_000 * rate), math.log(100_000 * rate)],
                [final(method, seed, rate) + 0.1, final(method, seed, rate)],
            )
            for rate in RATES
            if 50_000 * rate <= level <= 100_000 * rate
        ]
        return float(np.mean(arms))

    level = levels[1]
    lora, folora = ([kept(m, seed, level) for seed in range(3)] for m in ("lora", "folora"))
    assert frobenius["LoRA"][titles[1]] == stated(lora)
    difference = stated([a - b for a, b in zip(lora, folora, strict=True)], sign="+")
    assert frobenius["LoRA"]["minus folora1"] == f"{difference} *"
    assert frobenius["folora"]["minus folora1"] == "–"
    # Both norms are proportional here, so their tables are the same but for the sizes.
    assert [list(row.values()) for row in h_norm.values()] == [
        list(row.values()) for row in frobenius.values()
    ]
    assert f"H = {level / 100:g}" in h_norm["LoRA"]


def test_columns_of_a_block_are_chosen_by_title(made: Path) -> None:
    chosen = page(made, "methods shift | method; KL at matched task")
    (table,), (whole,) = tables(chosen), tables(page(made, "methods shift"))
    title = "KL at matched task"
    assert table == {n: {"method": n, title: row[title]} for n, row in whole.items()}
    assert "![" not in chosen and "mean ±" not in chosen  # neither pictures nor the caption


def test_narrow_tables_have_a_column_per_task(made: Path) -> None:
    (retained,) = tables(page(made, "retained shift"))
    lora = np.mean([final("lora", seed, 1e-2) for seed in range(3)])
    assert retained["LoRA"] == {"method": "LoRA", "shift": f"{lora:.3f} *"}
    (relative,) = tables(page(made, "relative_kl world_methods shift"))
    (whole,) = tables(page(made, "real_seeds world_methods shift lora"))
    assert relative["folora"]["shift"] == whole["folora"]["of LoRA's"]
    assert relative["LoRA"]["shift"] == f"KL {whole['LoRA']['KL']}"
    write_arm(made / "results", "mixed", "lora-kl", 1, RATES[0])
    (beside,) = tables(page(made, "relative_kl_beside mixed world_methods shift"))
    (whole,) = tables(page(made, "real_beside mixed shift world_methods"))
    assert beside["LoRA + KL"]["shift"] == whole["LoRA + KL"]["of LoRA's"]


@pytest.mark.parametrize(
    ("plan", "method"), [("world_ablation", "gate-off"), ("world_complements", "lora-kl")]
)
def test_variants_stand_beside_arms_of_their_rates_and_seeds(
    made: Path, plan: str, method: str
) -> None:
    text = page(made, f"variants {plan} shift")
    assert "at the same seeds and learning rates 0.001, 0.003: folora, lora, folora-null." in text
    (table,) = tables(text)
    title = METHODS[method].title
    assert list(table)[:4] == ["folora", "LoRA", "folora, null-space start", title]
    folora = [final("folora", seed, 3e-3) for seed in range(2)]
    variant = [final(method, seed, 3e-3) for seed in range(2)]
    assert table["folora"]["kept at matched task"] == stated(folora)
    assert (table["folora"]["arms"], table["folora"]["seeds"]) == ("4", "2")
    difference = stated([a - b for a, b in zip(variant, folora, strict=True)], sign="+")
    assert table[title]["minus folora"].removesuffix(" *") == difference


def test_ingredients_stand_beside_references_of_their_seeds(made: Path) -> None:
    """By the KL, all rates pooled; a setting of folora's is a row of its own."""
    write_arm(made / "results", "world_ablation", "folora", 1, 3e-3, -0.2, {"spectrum.tau": 1e-2})
    (table,) = tables(page(made, "ingredients world_ablation shift world_methods"))
    titles = [
        METHODS[m].title for m in ("folora", "folora-null", "lora", "eigen-frozen", "gate-off")
    ]
    assert set(table) == {*titles, "folora, tau = 0.01"}
    assert [table[title]["seeds"] for title in titles] == ["2"] * 5  # the references have three
    kl = {m: [(1 - final(m, s, r)) / 10 for s in range(2)] for m, r in (("folora", 1e-2), ("gate-off", 3e-3))}  # fmt: skip
    assert table["folora"]["KL at matched task"] == stated(kl["folora"], 4)
    more = [a - b for a, b in zip(kl["gate-off"], kl["folora"], strict=True)]
    assert table["folora, gate off"]["minus folora"].removesuffix(" *") == stated(more, 4, "+")
    assert table["folora, tau = 0.01"]["arms"] == "1"


def test_more_seeds_are_pooled_with_those_of_other_plans(made: Path) -> None:
    (made / "plans/world_seeds.yaml").write_text(yaml.safe_dump(MORE_SEEDS))
    for method in ("folora", "gate-off"):
        for rate in RATES[:2]:
            write_arm(made / "results", "world_seeds", method, 3, rate)
    text = page(made, "seeds world_seeds shift")
    (table,) = tables(text)
    assert list(table) == ["folora", "folora, gate off"]
    kept = [final("folora", seed, RATES[1]) for seed in range(4)]  # without the highest rate
    assert table["folora"]["kept at matched task"] == stated(kept)
    assert [row["seeds"] for row in table.values()] == ["4", "3"]
    assert "4 of 8 arms of `world_seeds` have no result yet (of seed 4)" in text


def test_more_seeds_of_a_real_model_are_compared_with_a_method_of_choice(made: Path) -> None:
    (made / "plans/more_seeds.yaml").write_text(yaml.safe_dump(MORE_SEEDS))
    for method, rate in product(("folora", "gate-off"), RATES[:2]):
        write_arm(made / "results", "more_seeds", method, 3, rate)
    text = page(made, "real_seeds more_seeds shift gate-off world_methods world_ablation")
    (table,) = tables(text)
    assert list(table) == ["folora", "folora, gate off"]  # and nothing else of those plans
    assert [row["seeds"] for row in table.values()] == ["4", "3"]
    assert "of folora, gate off's" in table["folora"]
    kl = [(1 - final("folora", seed, RATES[1])) / 10 for seed in range(4)]
    assert table["folora"]["KL"] == stated(kl, 4)
    assert "4 of 8 arms of `more_seeds` have no result yet (of seed 4)" in text


def test_a_rate_is_a_row_of_its_own_beside_references_of_its_seeds(made: Path) -> None:
    for rate in RATES[:2]:
        write_arm(made / "results", "rates", "folora", 1, rate)
    (table,) = tables(page(made, "real_rates rates shift world_methods"))
    assert {"LoRA", "folora", *(f"folora at {rate:g}" for rate in RATES[:2])} <= {*table}
    assert {row["seeds"] for row in table.values()} == {"1"}  # the references have three
    for title, method, rate in (
        (f"folora at {RATES[1]:g}", "folora", RATES[1]),
        ("LoRA", "lora", RATES[-1]),
    ):
        assert table[title]["KL"] == f"{(1 - final(method, 1, rate)) / 10:.4f}"


def test_rates_are_pooled_beside_references_of_the_same_seeds(made: Path) -> None:
    """So that a rate that learns little has no row of its own to lower the matched loss."""
    for rate in RATES[:2]:
        write_arm(made / "results", "mixed", "lora-kl", 1, rate)
    (table,) = tables(page(made, "real_beside mixed shift world_methods"))
    assert {"LoRA", "folora", "LoRA + KL"} <= {*table}
    assert table["LoRA + KL"]["arms"] == "2"
    assert {row["seeds"] for row in table.values()} == {"1"}


def test_a_real_model_is_asked_before_and_after(made: Path) -> None:
    for method in ("lora", "folora"):
        for seed in range(2):
            values = write_arm(made / "results", "world_methods", method, seed, 1e-3)
            for reading in (values["base"], *values["readings"]):
                reading["task"] = {}
                reading["other"] = {"city.nats": -reading["step"] / 100}
            values["readings"][0]["kept"] = {}  # read, but not asked
            ResultFile(made / "results/real_plan.jsonl").add(
                values | {"stage": "real", "task": "words"}
            )
    found = render("{{ real real_plan words }}", source(made))
    forgotten, asked = tables(found.text)
    # A loss of 1 - .6 is reached at the end alone.
    kl = [(1 - final("folora", seed, 1e-3)) / 10 for seed in range(2)]
    assert forgotten["folora"]["KL"] == stated(kl, 4)
    lost = [1 - final("lora", seed, 1e-3) for seed in range(2)]
    assert forgotten["LoRA"]["kept lost"] == stated(lost, 4)
    assert asked["city (kept)"]["base"] == "1.000 ± 0.000"
    kept = [final("folora", seed, 1e-3) - 0.05 for seed in range(2)]
    assert asked["city (kept)"]["folora"] == stated(kept)
    assert asked["city.nats"]["LoRA"] == "-1.000 ± 0.000"
    assert set(found.pictures) == {"real_plan_words.png"}
    found.pictures["real_plan_words.png"](made / "picture.png")


def test_knobs(made: Path) -> None:
    (table,) = tables(page(made, "knobs folora"))
    assert list(table) == ["defaults", "tau = 1e-05", "tau = 0.1", "s_min = 0"]
    assert (table["defaults"]["arms"], table["tau = 0.1"]["arms"]) == ("4", "4")
    kept = [final("folora", seed, 3e-3) - 0.3 * (1 + seed) for seed in range(2)]
    assert table["tau = 1e-05"]["kept at matched task"] == stated(kept)
    assert table["tau = 1e-05"]["minus defaults"] == stated([-0.3, -0.6], sign="+")
    assert table["s_min = 0"]["minus defaults"].startswith("+0.000 ± 0.000")


def test_calibration(made: Path) -> None:
    text = page(made, "calibration")
    table, null = tables(text)
    assert list(table) == ["folora, self 16", "folora, self 256", "folora, narrow 256"]
    assert list(null) == [row.replace("folora", "folora, null-space start") for row in table]
    narrow = [final("folora", seed, 3e-3) - 0.5 for seed in range(2)]
    assert table["folora, narrow 256"]["kept at matched task"] == stated(narrow)
    minus = table["folora, narrow 256"]["minus folora, self 256"]
    assert minus.removesuffix(" *") == "-0.500 ± 0.000"
    assert text.count("Matched task: score of at least 0.900.") == 2


def test_spectra(made: Path) -> None:
    values = json.loads((made / "results/spectra/tiny.json").read_text())
    c_pre, c_task = moments(made / "run")
    h = c_pre + TAU * np.mean(np.diag(c_pre)) * np.eye(3)
    gamma = scipy.linalg.eigh(c_task, h, eigvals_only=True)[::-1]
    first, second = values["groups"]
    assert (first["name"], first["d"], len(first["gamma"])) == ("a", 3, 33)
    assert first["gamma"][::16] == pytest.approx(gamma, rel=1e-5)
    assert first["off_diagonal"] == pytest.approx(2 / 11, rel=1e-5)
    assert first["open"] == pytest.approx(np.mean(gamma / (gamma + 1) > S_MIN), rel=1e-5)
    assert first["half"] == 1 + int(gamma[0] < gamma.sum() / 2)
    assert second["off_diagonal"] == 0
    (table,) = tables(page(made, "spectra"))
    assert table["tiny"]["off-diagonal mass"] == "0.091 (0.000 to 0.182)"
    assert table["tiny"]["groups"] == "2"


def test_off_diagonal_mass_needs_no_scale_and_no_basis() -> None:
    c_pre, c_task = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.ones(3, 3)
    assert off_diagonal_mass(c_pre, c_task) == pytest.approx(6 / 9)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turned = off_diagonal_mass(5 * turn @ c_pre @ turn.T, 1e-3 * turn @ c_task @ turn.T)
    assert turned == pytest.approx(6 / 9, rel=1e-4)
    assert off_diagonal_mass(c_pre, torch.zeros(3, 3)) == 0.0
    with pytest.raises(NumericsError, match="zero"):
        off_diagonal_mass(torch.zeros(3, 3), c_task)


def test_a_page_has_its_text_and_small_pictures(made: Path) -> None:
    places = {name: str(made / name) for name in ("results", "plans")}
    main(["--results", places["results"], "--plans", places["plans"], "--template",
          str(made / "template.md"), "--output", str(made / "docs" / "page.md")])  # fmt: skip
    text = (made / "docs" / "page.md").read_text()
    assert text.startswith("# Page\n") and "{{" not in text
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert shown == [
        f"pictures/{name}.png"
        for name in ("methods_shift", "norms_shift", "knobs_folora", "calibration", "spectra")
    ]
    for name in shown:
        content = (made / "docs" / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) <= 100_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{{ metods shift }}", "unknown block 'metods' (did you mean 'methods'?)"),
        ("{{ methods shfit }}", "unknown task 'shfit' (did you mean 'shift'?)"),
        ("{{ methods }}", "missing a required argument: 'task'"),
        ("{{ runs shift }}", "too many positional arguments"),
        ("{{ variants world_knobs shift }}", "unknown plan of variants 'world_knobs'"),
        ("{{ knobs loar }}", "unknown method 'loar' (did you mean 'lora'?)"),
        ("{{ }}", "unknown block ''"),
        ("{{ methods shift | methd }}", "unknown column 'methd' (did you mean 'method'?)"),
        ("see {{ runs }}", "a line of its own"),
    ],
)
def test_a_wrong_line_is_named(made: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        render(f"# Page\n\n{line}\n", source(made), "page.md")
    assert f"page.md, line 3, {line!r}: " in str(caught.value)
    assert message in str(caught.value)


def test_what_is_missing_is_said(made: Path) -> None:
    """Without a plan's results, then with one arm less, then with nothing at all."""
    results = made / "results"
    (results / "world_ablation.jsonl").rename(made / "aside")
    assert page(made, "variants world_ablation shift") == (
        "*No results of `world_ablation` `shift` yet.*\n"
    )
    assert tables(page(made, "runs"))[0]["world_ablation"]["arms"] == "0 of 8"
    assert page(made, "knobs lora") == "*No results of `world_knobs` `lora`; none are planned.*\n"
    methods = results / "world_methods.jsonl"
    lines = methods.read_text().splitlines(keepends=True)
    gone = [line for line in lines if '"lora--training.learning_rate=0.001"' in line]
    methods.write_text("".join(line for line in lines if line != gone[2]))
    text = page(made, "methods shift")
    assert "*Incomplete: 1 of 36 arms of `world_methods` have no result yet (of seed 2).*" in text
    for path in results.rglob("*.json*"):
        path.unlink()
    found = render(TEMPLATE, source(made))
    assert not found.pictures
    assert found.text.count("*No results of ") == 7


def test_variants_without_references_and_knobs_without_defaults(made: Path) -> None:
    (made / "results/world_methods.jsonl").rename(made / "aside")
    text = page(made, "variants world_ablation shift")
    assert list(tables(text)[0]) == [METHODS[name].title for name in ("gate-off", "eigen-frozen")]
    assert "*No arms of folora, lora, folora-null to compare with yet.*" in text
    assert page(made, "knobs folora").startswith("*No results of `world_methods` `folora`")


def test_a_comparison_without_a_plan_and_the_demo_have_blocks_too(made: Path) -> None:
    assert page(made, "demo") == "*No result of `make demo` yet.*\n"
    (made / "demo.json").write_text((ROOT / "docs/demo.json").read_text())
    scores = json.loads((made / "demo.json").read_text())[0]["scores"]
    assert f"| {scores['base']['task_loss']:.3f} | {scores['LoRA']['task_loss']:.3f} |" in page(
        made, "demo"
    )
    shutil.copyfile(made / "results/world_methods.jsonl", made / "results/elsewhere.jsonl")
    found = render("{{ compared elsewhere shift }}", source(made))
    assert set(found.pictures) == {"elsewhere_shift.png"}
    (there,) = tables(found.text)
    (main_table, *_) = tables(page(made, "methods shift"))
    assert there == main_table


def test_numbers_in_the_text_are_in_the_tables() -> None:
    """The text of a template is written by hand; what it quotes must be in a table made from results."""
    templates = {
        template: output
        for template, output in pages(ROOT / "docs").items()
        if "results" in template.relative_to(TEMPLATES).as_posix()
    }
    text = "\n".join(template.read_text(encoding="utf-8") for template in templates)
    by_hand = {line for line in text.splitlines() if "{{" not in line}
    made = "\n".join(
        line
        for output in templates.values()
        for line in output.read_text(encoding="utf-8").splitlines()
        if line not in by_hand
    )
    pattern = r"(?<![\w.])\d*\.\d{2,}(?![\w%])|(?<![\w.])\d+\.\d%"
    stated = {found for line in by_hand for found in re.findall(pattern, line)}
    assert len(stated) > 100
    assert [number for number in sorted(stated) if number.lstrip("0") not in made] == []


@pytest.mark.parametrize(
    ("template", "output"), pages(ROOT / "docs").items(), ids=lambda path: path.name
)
def test_the_committed_page_is_what_the_results_give(template: Path, output: Path) -> None:
    found = render(
        template.read_text(encoding="utf-8"),
        Source.load(
            ROOT / "benchmarks/results", ROOT / "benchmarks/plans", ROOT / "docs/demo.json"
        ),
    )
    committed = output.read_text(encoding="utf-8")
    assert committed == found.text, "results, plans or template have changed: run `make results`"
    assert [n for n in found.pictures if not (output.parent / "pictures" / n).is_file()] == []
