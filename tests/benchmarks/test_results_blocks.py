"""Tables of docs/results from synthetic results, against numbers computed independently."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from support.made_results import (
    MORE_SEEDS,
    RATES,
    final,
    moments,
    page,
    source,
    stated,
    tables,
    write_arm,
)

from benchmarks.report.page import render
from benchmarks.spectra import off_diagonal_mass
from folora.compare.results import ResultFile
from folora.config import S_MIN, TAU
from folora.errors import NumericsError
from folora.methods import METHODS


def test_methods(made: Path) -> None:
    text = page(made, "methods shift")
    (table,) = tables(text)
    assert list(table) == ["folora", "folora, null-space init", "LoRA", "MiLoRA"]
    lora = [final("lora", seed, 1e-2) for seed in range(3)]  # the highest rate retains the most
    folora = [final("folora", seed, 1e-2) for seed in range(3)]
    assert table["LoRA"]["retained at matched task"] == stated(lora)
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
        """Mean over the arms that pass the level, interpolated linearly in the logarithm."""
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
    # Both norms are proportional here, so their tables differ in scale only.
    assert [list(row.values()) for row in h_norm.values()] == [
        list(row.values()) for row in frobenius.values()
    ]
    assert f"H = {level / 100:g}" in h_norm["LoRA"]


@pytest.mark.parametrize(
    ("plan", "method"), [("world_ablation", "gate-off"), ("world_complements", "lora-kl")]
)
def test_variants_are_compared_at_the_same_rates_and_seeds(
    made: Path, plan: str, method: str
) -> None:
    text = page(made, f"variants {plan} shift")
    assert "at the same seeds and learning rates 0.001, 0.003: folora, lora, folora-null." in text
    (table,) = tables(text)
    title = METHODS[method].title
    assert list(table)[:4] == ["folora", "LoRA", "folora, null-space init", title]
    folora = [final("folora", seed, 3e-3) for seed in range(2)]
    variant = [final(method, seed, 3e-3) for seed in range(2)]
    assert table["folora"]["retained at matched task"] == stated(folora)
    assert (table["folora"]["arms"], table["folora"]["seeds"]) == ("4", "2")
    difference = stated([a - b for a, b in zip(variant, folora, strict=True)], sign="+")
    assert table[title]["minus folora"].removesuffix(" *") == difference


def test_ingredients_are_compared_with_references_of_the_same_seeds(made: Path) -> None:
    """By KL, with all rates pooled; each setting of folora has a row."""
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
    assert table["folora"]["retained at matched task"] == stated(kept)
    assert [row["seeds"] for row in table.values()] == ["4", "3"]
    assert "4 of 8 arms of `world_seeds` have no result yet (of seed 4)" in text


def test_more_seeds_of_a_real_model_are_compared_with_a_chosen_method(made: Path) -> None:
    (made / "plans/more_seeds.yaml").write_text(yaml.safe_dump(MORE_SEEDS))
    for method, rate in product(("folora", "gate-off"), RATES[:2]):
        write_arm(made / "results", "more_seeds", method, 3, rate)
    text = page(made, "real_seeds more_seeds shift gate-off world_methods world_ablation")
    (table,) = tables(text)
    assert list(table) == ["folora", "folora, gate off"]  # and no other arm of those plans
    assert [row["seeds"] for row in table.values()] == ["4", "3"]
    assert "of folora, gate off's" in table["folora"]
    kl = [(1 - final("folora", seed, RATES[1])) / 10 for seed in range(4)]
    assert table["folora"]["KL"] == stated(kl, 4)
    assert "4 of 8 arms of `more_seeds` have no result yet (of seed 4)" in text


def test_each_rate_has_a_row_and_references_of_the_same_seeds(made: Path) -> None:
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


def test_pooled_rates_are_compared_with_references_of_the_same_seeds(made: Path) -> None:
    """Otherwise a rate that learns little would have a row and change the matched loss."""
    for rate in RATES[:2]:
        write_arm(made / "results", "mixed", "lora-kl", 1, rate)
    (table,) = tables(page(made, "real_beside mixed shift world_methods"))
    assert {"LoRA", "folora", "LoRA + KL"} <= {*table}
    assert table["LoRA + KL"]["arms"] == "2"
    assert {row["seeds"] for row in table.values()} == {"1"}


def test_a_real_model_is_scored_before_and_after_training(made: Path) -> None:
    for method in ("lora", "folora"):
        for seed in range(2):
            values = write_arm(made / "results", "world_methods", method, seed, 1e-3)
            for reading in (values["base"], *values["readings"]):
                reading["task"] = {}
                reading["other"] = {"city.nats": -reading["step"] / 100}
            values["readings"][0]["kept"] = {}  # measured, but without probes
            ResultFile(made / "results/real_plan.jsonl").add(
                values | {"stage": "real", "task": "words"}
            )
    found = render("{{ real real_plan words }}", source(made))
    forgotten, asked = tables(found.text)
    # A loss of 1 - .6 is reached at the last step only.
    kl = [(1 - final("folora", seed, 1e-3)) / 10 for seed in range(2)]
    assert forgotten["folora"]["KL"] == stated(kl, 4)
    lost = [1 - final("lora", seed, 1e-3) for seed in range(2)]
    assert forgotten["LoRA"]["score lost"] == stated(lost, 4)
    assert asked["city (retained)"]["base"] == "1.000 ± 0.000"
    kept = [final("folora", seed, 1e-3) - 0.05 for seed in range(2)]
    assert asked["city (retained)"]["folora"] == stated(kept)
    assert asked["city.nats"]["LoRA"] == "-1.000 ± 0.000"
    assert set(found.pictures) == {"real_plan_words.png"}
    found.pictures["real_plan_words.png"](made / "picture.png")


def test_knobs(made: Path) -> None:
    (table,) = tables(page(made, "knobs folora"))
    assert list(table) == ["defaults", "tau = 1e-05", "tau = 0.1", "s_min = 0"]
    assert (table["defaults"]["arms"], table["tau = 0.1"]["arms"]) == ("4", "4")
    kept = [final("folora", seed, 3e-3) - 0.3 * (1 + seed) for seed in range(2)]
    assert table["tau = 1e-05"]["retained at matched task"] == stated(kept)
    assert table["tau = 1e-05"]["minus defaults"] == stated([-0.3, -0.6], sign="+")
    assert table["s_min = 0"]["minus defaults"].startswith("+0.000 ± 0.000")


def test_calibration(made: Path) -> None:
    text = page(made, "calibration")
    table, null = tables(text)
    assert list(table) == ["folora, self 16", "folora, self 256", "folora, narrow 256"]
    assert list(null) == [row.replace("folora", "folora, null-space init") for row in table]
    narrow = [final("folora", seed, 3e-3) - 0.5 for seed in range(2)]
    assert table["folora, narrow 256"]["retained at matched task"] == stated(narrow)
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
    assert first["gate"] == pytest.approx(gamma[1] / (gamma[1] + 1), rel=1e-5)  # r is 2
    assert second["null"] == {"pre": pytest.approx(3 / 6), "task": pytest.approx(3 / 5)}
    assert second["leading"] == {"pre": pytest.approx(3 / 6), "task": pytest.approx(3 / 5)}
    v = scipy.linalg.eigh(c_task, h)[1][:, ::-1][:, :2]
    span = np.linalg.qr(v)[0]
    assert first["leading"]["task"] == pytest.approx(np.trace(span.T @ c_task @ span) / 5, rel=1e-5)
    assert first["leading"]["pre"] == pytest.approx(np.trace(span.T @ c_pre @ span) / 6, rel=1e-5)
    assert second["off_diagonal"] == 0
    (table,) = tables(page(made, "spectra"))
    assert table["tiny"]["off-diagonal mass"] == "0.091 (0.000 to 0.182)"
    assert table["tiny"]["groups"] == "2"
    gates = [first["gate"], second["gate"]]
    assert (
        table["tiny"]["least gate"]
        == f"{np.mean(gates):.2f} ({min(gates):.2f} to {max(gates):.2f})"
    )


def test_off_diagonal_mass_needs_no_scale_and_no_basis() -> None:
    c_pre, c_task = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.ones(3, 3)
    assert off_diagonal_mass(c_pre, c_task) == pytest.approx(6 / 9)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turned = off_diagonal_mass(5 * turn @ c_pre @ turn.T, 1e-3 * turn @ c_task @ turn.T)
    assert turned == pytest.approx(6 / 9, rel=1e-4)
    assert off_diagonal_mass(c_pre, torch.zeros(3, 3)) == 0.0
    with pytest.raises(NumericsError, match="zero"):
        off_diagonal_mass(torch.zeros(3, 3), c_task)
