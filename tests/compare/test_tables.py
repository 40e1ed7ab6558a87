"""Made-up results on disk, and the numbers of their tables computed a second time by hand."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy import stats
from support.arms import load, reading, write, write_all

from folora.compare.frontier import at_norm, kept_at
from folora.compare.plots import (
    COLORS,
    MARKERS,
    frontier_picture,
    mean_at_norm,
    mean_staircase,
    norm_picture,
)
from folora.compare.results import grouped, of_task, point_sets, scores_of
from folora.compare.tables import Table, best_average, comparison_table
from folora.errors import DataError


def cells(table: Table, row: str) -> dict[str, str]:
    found = next(r for r in table.rows if r[0] == row)
    return dict(zip(table.header, found, strict=True))


def stated(values: list[float], digits: int, sign: str = "-") -> str:
    """Mean ± half-width of the t interval, with SciPy's own interval."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return f"{np.mean(values):{sign}.{digits}f} ± {(high - low) / 2:.{digits}f}"


def test_nulls_after_divergence_become_nan_and_leave_the_frontier(tmp_path: Path) -> None:
    gone = dict.fromkeys(reading(0, 0, 0, 0))
    gone |= {"step": 50, "task": {"accuracy": None}, "kept": {"city": 0.5, "copy": None}}
    write(
        tmp_path, "lora", 0, [], readings=[reading(25, 0.6, 0.8, 0.1), gone], diverged=True
    )  # fmt: skip
    (result,) = load(tmp_path)
    last = result.points(scores_of([result]))[-1]
    assert last.step == 50
    assert all(map(math.isnan, (last.task, last.kept, last.kl, last.frobenius, last.h_norm)))
    table = comparison_table([result], "shift", level=0.5)
    assert cells(table, "LORA")["retained at matched task"] == "0.800"
    assert cells(table, "LORA")["arms"] == "1 (1 diverged)"
    frontier_picture([result], "shift", tmp_path / "one.png")
    norm_picture([result], "shift", tmp_path / "two.png")


# --- groups and scores


def test_arms_are_pooled_by_method_and_seed(tmp_path: Path) -> None:
    write_all(tmp_path)
    write(tmp_path, "lora", 1, [(0.3, 0.3, 0.3)], task="other")
    results = load(tmp_path)
    chosen = of_task(results, "shift", ["lora", "folora"])
    sets = point_sets(chosen)
    assert [(method, list(seeds)) for method, seeds in sets.items()] == [
        ("lora", [0, 1, 2]),
        ("folora", [0, 1, 2]),
    ]
    assert len(sets["folora"][0]) == 6  # two arms of two readings, each with its base
    assert sum(p.step == 0 for p in sets["folora"][0]) == 2
    assert [len(arms) for arms in grouped(chosen)["folora"].values()] == [2, 2, 2]
    with pytest.raises(DataError, match="seed 1 of task 'shift' has two stages, 'world-1/other'"):
        grouped(results)


def test_compute_is_relative_to_loras_and_shown_only_where_it_was_counted(tmp_path: Path) -> None:
    def tokens(task: int, anchor: int = 0, base: int = 0, setup: int = 0, scale: int = 0) -> Any:
        return {"tokens": {"task": task, "anchor": anchor, "base": base, "setup": setup, "scale": scale}}  # fmt: skip

    numbers = [(0.9, 0.9, 0.1)]
    write(tmp_path, "lora", 0, numbers)
    write(tmp_path, "old", 0, numbers)
    assert "tokens of LoRA's" not in comparison_table(load(tmp_path), "shift").header
    write(tmp_path, "lora", 1, numbers, **tokens(1000))
    write(tmp_path, "lora", 1, numbers, name="gone", diverged=True, **tokens(10))
    write(tmp_path, "folora", 1, numbers, **tokens(1000, anchor=80, setup=600, scale=200))
    write(tmp_path, "masked", 1, numbers, **tokens(900, base=900))
    table = comparison_table(load(tmp_path), "shift")
    found = {row: cells(table, row)["tokens of LoRA's"] for row in ("LORA", "OLD", "FOLORA", "MASKED")}  # fmt: skip
    assert found == {"LORA": "1.00", "OLD": "–", "FOLORA": "1.08 (1.48)", "MASKED": "1.35"}
    assert "set-up" in table.caption


def test_without_scorers_loss_and_kl_are_the_scores(tmp_path: Path) -> None:
    write(tmp_path, "lora", 0, [(0.2, 0.9, 0.1)], scored=False)
    (result,) = load(tmp_path)
    points = result.points(scores_of([result]))
    assert [p.task for p in points] == pytest.approx([-1.8, -1.6])
    assert [p.kept for p in points] == pytest.approx([0.0, -0.1])


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path / "a")
    results = load(tmp_path / "a")
    with pytest.raises(DataError, match="no results of task 'shfit'; tasks with results: shift"):
        comparison_table(results, "shfit")
    with pytest.raises(DataError, match="no results of method 'osf'"):
        comparison_table(results, "shift", methods=["folora", "osf"])
    write(tmp_path / "b", "osf", 0, [(0.2, 0.9, 0.1)], scored=False)
    with pytest.raises(DataError, match="no scores of 'task'"):
        comparison_table(results + load(tmp_path / "b"), "shift")
    write(tmp_path / "c", "osf", 0, [(0.2, 0.9, 0.1)], stage="smollm2/shift")
    with pytest.raises(DataError, match="two stages"):
        comparison_table(results + load(tmp_path / "c"), "shift")
    base = {**reading(0, 0.1, 0.9, 0.0, scored=False), "task_loss": None}
    write(tmp_path / "d", "osf", 0, [], scored=False, base=base)
    with pytest.raises(DataError, match="the base of"):
        comparison_table(load(tmp_path / "d"), "shift")


# --- tables


def test_table_of_scores(tmp_path: Path) -> None:
    write_all(tmp_path)
    table = comparison_table(load(tmp_path), "shift")
    # The best method reaches 1.0 from 0.1, so the level is .91; 90 % of the base's .95 is .855.
    assert "score of at least 0.910 (90 % of the way" in table.caption
    assert "score of at least 0.855 (90 % of the base's)" in table.caption
    folora, lora = cells(table, "FOLORA"), cells(table, "LORA")
    assert folora["retained at matched task"] == "0.700 ± 0.000"
    assert lora["retained at matched task"] == stated([0.5, 0.47, 0.44], 3)
    assert lora["minus FOLORA"] == stated([-0.2, -0.23, -0.26], 3, "+") + " *"
    assert folora["minus FOLORA"] == "–"
    assert lora["KL at matched task"] == stated([0.5, 0.51, 0.52], 4)
    assert folora["task at matched retention"] == "0.700 ± 0.000"
    assert lora["task at matched retention"] == "0.100 ± 0.000"  # the base itself
    # Steps above the base's .1: .6 wide at .9, then .2 and .1.
    areas = [(0.6 * 0.9 + 0.2 * (0.8 - 0.01 * s) + 0.1 * 0.7) / 0.9 for s in range(3)]
    assert folora["area"] == stated(areas, 3)
    # GM is best at (.9, .8): .72 beats .7 * .9 and 1 * .7, down to .9 * .78 = .702.
    avg1 = [0.8, 0.79, 0.78]
    assert folora["Avg1"] == stated(avg1, 3)
    assert folora["Avg1 %"] == stated([100 * a / 0.95 for a in avg1], 1)
    assert folora["Avg2"] == stated([(a + 0.9) / 2 for a in avg1], 3)
    assert folora["GM"] == stated([math.sqrt(a * 0.9) for a in avg1], 3)
    assert (folora["arms"], folora["seeds"], lora["arms"]) == ("6", "3", "3")


def test_table_of_losses(tmp_path: Path) -> None:
    write_all(tmp_path, scored=False)
    table = comparison_table(load(tmp_path), "shift")
    # Best losses are 0 and .1 (task .95), both beyond halfway from 1.8.
    assert "loss of at most 0.100 nats per token (reached by every method" in table.caption
    assert "Matched KL: at most 0.05 nats per token" in table.caption
    assert table.header[1:-2] == (
        "KL at matched task", "minus FOLORA", "loss at matched KL", "area",
    )  # fmt: skip
    assert cells(table, "FOLORA")["KL at matched task"] == "0.3000 ± 0.0000"
    assert cells(table, "LORA")["KL at matched task"] == stated([0.5, 0.51, 0.52], 4)
    assert cells(table, "FOLORA")["loss at matched KL"] == "0.200 ± 0.000"
    assert cells(table, "LORA")["loss at matched KL"] == "1.800 ± 0.000"
    # From loss 1.8 to the best of all, 0, and from KL .5 to 0; the last of lora's is at the floor.
    area = 1.0 * 0.4 / (1.8 * 0.5)
    assert cells(table, "LORA")["area"] == f"{area:.3f} ± 0.000"
    given = comparison_table(load(tmp_path), "shift", level=-0.2, kept_level=-0.1)
    assert "loss of at most 0.200 nats per token. " in given.caption
    assert cells(given, "LORA")["minus FOLORA"] == stated([0.46, 0.47, 0.48], 4, "+") + " *"
    assert cells(given, "LORA")["loss at matched KL"] == "0.800 ± 0.000"


def test_seeds_that_do_not_get_there_are_counted(tmp_path: Path) -> None:
    write_all(tmp_path)
    write(tmp_path, "lora", 1, [(0.6, 0.7, 0.1)])
    table = comparison_table(load(tmp_path), "shift", level=0.9)
    row = cells(table, "LORA")
    assert row["retained at matched task"] == stated([0.5, 0.44], 3) + " (2 of 3 seeds)"
    # The reference keeps .8 and .78 there.
    assert row["minus FOLORA"] == stated([-0.3, -0.34], 3, "+") + " (2 of 3 seeds) *"


def test_a_difference_is_marked_only_if_the_interval_excludes_zero(tmp_path: Path) -> None:
    for seed, (a, b) in enumerate([(0.8, 0.7), (0.7, 0.8), (0.75, 0.75)]):
        write(tmp_path, "folora", seed, [(1.0, a, 0.1)])
        write(tmp_path, "lora", seed, [(1.0, b, 0.1)])
    row = cells(comparison_table(load(tmp_path), "shift"), "LORA")
    assert row["minus FOLORA"] == stated([-0.1, 0.1, 0.0], 3, "+")


def test_one_seed_has_no_interval_and_no_mark(tmp_path: Path) -> None:
    write(tmp_path, "folora", 0, [(1.0, 0.9, 0.1)])
    write(tmp_path, "lora", 0, [(1.0, 0.5, 0.1)])
    row = cells(comparison_table(load(tmp_path), "shift"), "LORA")
    assert (row["retained at matched task"], row["minus FOLORA"]) == ("0.500", "-0.400")


def test_methods_come_in_the_order_asked_for_and_without_the_reference(tmp_path: Path) -> None:
    write_all(tmp_path)
    write(tmp_path, "osf", 0, [(0.6, 0.7, 0.1)])
    results = load(tmp_path)
    both = comparison_table(results, "shift", methods=["lora", "folora"])
    assert [row[0] for row in both.rows] == ["LORA", "FOLORA"]
    alone = comparison_table(results, "shift", methods=["osf", "lora"])
    assert not any("minus" in title for title in alone.header)
    other = comparison_table(results, "shift", reference="lora")
    assert cells(other, "FOLORA")["minus LORA"].startswith("+0.230 ± ")


def test_best_average_of_arms_that_never_gave_a_number(tmp_path: Path) -> None:
    write(tmp_path, "lora", 0, [(0.5, 0.8, 0.1)])
    assert best_average(load(tmp_path)).gm == pytest.approx(math.sqrt(0.4))
    assert math.isnan(best_average([]).gm)


def test_table_as_markdown_and_in_a_terminal() -> None:
    table = Table(("method", "kept"), (("a|b", "0.5 ± 0.1"), ("[c]", "–")), "What it [means].")
    assert table.markdown().splitlines() == [
        "| method | kept |",
        "| --- | ---: |",
        r"| a\|b | 0.5 ± 0.1 |",
        "| [c] | – |",
        "",
        "What it [means].",
    ]
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(table.rich())
    text = captured.get()
    assert all(part in text for part in ("a|b", "0.5 ± 0.1", "[c]", "What it [means]."))


# --- pictures


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("draw", [frontier_picture, norm_picture])
def test_pictures_are_small_pngs(tmp_path: Path, scored: bool, draw: Any) -> None:
    rng = np.random.default_rng(0)
    write_all(tmp_path, scored)
    for i in range(9):  # more methods than colours
        for seed in range(3):
            numbers = [tuple(map(float, rng.uniform(0.06, 0.94, 3))) for _ in range(20)]
            write(tmp_path, f"method{i}", seed, numbers, scored=scored)  # type: ignore[arg-type]
    path = tmp_path / "new" / "folder" / "picture.png"
    draw(load(tmp_path), "shift", path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size <= 100_000
    with Image.open(path) as image:
        assert image.width >= 640 and image.height >= 320
        seen = {color for _, color in image.convert("RGB").getcolors(1 << 20) or []}

    def shown(color: str) -> bool:
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        return any(np.abs(wanted - np.array(c)).max() < 24 for c in seen)

    assert all(shown(color) for color in COLORS)


def test_pictures_of_chosen_methods_only(tmp_path: Path) -> None:
    write_all(tmp_path)
    results = load(tmp_path)
    for draw in (frontier_picture, norm_picture):
        draw(results, "shift", tmp_path / "all.png")
        draw(results, "shift", tmp_path / "one.png", methods=["folora"])
        assert (tmp_path / "all.png").read_bytes() != (tmp_path / "one.png").read_bytes()
        with pytest.raises(DataError, match="osf"):
            draw(results, "shift", tmp_path / "none.png", methods=["osf"])


def test_no_two_methods_look_alike() -> None:
    count = len(COLORS) * len(MARKERS)
    pairs = {(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i in range(count)}
    assert len(pairs) == count


def test_mean_curves_end_where_the_first_seed_ends(tmp_path: Path) -> None:
    write(tmp_path, "lora", 0, [(0.5, 0.9, 0.1), (1.0, 0.5, 0.2)])
    write(tmp_path, "lora", 1, [(0.5, 0.7, 0.1)])
    results = load(tmp_path)
    seeds = point_sets(results)["lora"]
    levels, kept = mean_staircase(seeds)
    assert (levels[0], levels[-1]) == (0.1, 1.0)
    assert kept[0] == pytest.approx(0.95)
    inside = (levels > 0.1) & (levels <= 0.5)
    assert kept[inside] == pytest.approx(0.8)
    assert np.isnan(kept[levels > 0.5]).all()
    assert kept[40] == np.mean([kept_at(points, levels[40]) for points in seeds.values()])

    scores = scores_of(results)
    paths = {r.seed: [r.points(scores)] for r in results}
    norms, kept = mean_at_norm(paths, "frobenius")
    assert (norms[0], norms[-1]) == pytest.approx((2.5, 5.0))
    assert np.isnan(kept[1:]).all()  # seed 1 has a single reading and crosses nothing
    norms, kept = mean_at_norm({0: paths[0]}, "h_norm")
    middle = at_norm(paths[0], float(norms[70]), "h_norm")
    assert kept[70] == middle == pytest.approx(0.9 - 0.4 * math.log2(norms[70] / 0.25))
