"""Pages made from results: blocks, columns and missing results; the committed pages are current."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.made_results import PLANS, RATES, TEMPLATE, final, page, source, tables, write_arm

from benchmarks.report.__main__ import main
from benchmarks.report.page import TEMPLATES, pages, refresh, render
from benchmarks.report.source import Source
from folora.errors import ConfigError
from folora.methods import METHODS

ROOT = Path(__file__).parents[2]


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


def test_columns_of_a_block_are_chosen_by_title(made: Path) -> None:
    chosen = page(made, "methods shift | method; KL at matched task")
    (table,), (whole,) = tables(chosen), tables(page(made, "methods shift"))
    title = "KL at matched task"
    assert table == {n: {"method": n, title: row[title]} for n, row in whole.items()}
    assert "![" not in chosen and "mean ±" not in chosen  # neither images nor the caption


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


def test_a_page_has_its_text_and_small_images(made: Path) -> None:
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


def test_missing_results_are_reported(made: Path) -> None:
    """Without the results of a plan, then with one arm missing, then without any result."""
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


def test_blocks_of_a_comparison_without_a_plan_and_of_the_demo(made: Path) -> None:
    assert page(made, "demo") == "*No result of `make demo` yet.*\n"
    shown = {"header": ["", "LoRA"], "rows": [["task loss", "0.257"]], "caption": "One seed."}
    (made / "demo.json").write_text(json.dumps({"table": shown}))
    assert page(made, "demo") == "|  | LoRA |\n| --- | ---: |\n| task loss | 0.257 |\n\nOne seed.\n"
    marked = "Before.\n<!-- {{ demo }} -->\nold\n<!-- end -->\nAfter.\n"
    fresh = refresh(marked, source(made))
    assert fresh == marked.replace("old\n", page(made, "demo"))
    assert refresh(fresh, source(made)) == fresh
    shutil.copyfile(made / "results/world_methods.jsonl", made / "results/elsewhere.jsonl")
    found = render("{{ compared elsewhere shift }}", source(made))
    assert set(found.pictures) == {"elsewhere_shift.png"}
    (there,) = tables(found.text)
    (main_table, *_) = tables(page(made, "methods shift"))
    assert there == main_table


def test_numbers_in_the_text_are_in_the_tables() -> None:
    """The text of a template is hand-written; numbers that it quotes must be in a generated table."""
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
def test_the_committed_page_is_current(template: Path, output: Path) -> None:
    found = render(
        template.read_text(encoding="utf-8"),
        Source.load(
            ROOT / "benchmarks/results", ROOT / "benchmarks/plans", ROOT / "docs/demo.json"
        ),
    )
    committed = output.read_text(encoding="utf-8")
    assert committed == found.text, "results, plans or template have changed: run `make results`"
    assert [n for n in found.pictures if not (output.parent / "pictures" / n).is_file()] == []
