"""Runs on a mixture of sources: readings of each, resuming, base files, and what is refused in seconds."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import folora
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config, write_rows
from folora.calibration.base_file import read_base_file
from folora.cli.main import main
from folora.errors import MismatchError
from folora.metrics.summary import summary
from folora.pipeline.run import Run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> folora.FoLoraConfig:
    """Of a finished run of a chat model, with a budget."""
    place = tmp_path_factory.mktemp("sources")
    make_llama().save_pretrained(place / "model")
    make_tokenizer(chat=True).save_pretrained(place / "model")
    data = write_rows(place / "rows.jsonl")
    config = tiny_config(
        model=str(place / "model"), dataset=str(data), output=str(place / "run"), budget=0.05
    )
    Run(config).run()
    return config


def test_a_run_reports_the_kl_of_each_source(config: folora.FoLoraConfig) -> None:
    assert config.output is not None
    report = json.loads((Path(config.output) / "report.json").read_text())
    assert report["sources"] == ["bos", "chat"]
    by_source = report["adapted"]["kl_by_source"]
    assert [*by_source] == ["bos", "chat"]
    assert min(by_source.values()) <= report["adapted"]["kl"] <= max(by_source.values())
    kept = report["budget"][0]["kept"]
    assert kept["by_source"] == pytest.approx(by_source, rel=1e-3)
    console = Console(width=200, file=StringIO())
    console.print(summary(report), soft_wrap=True)
    text = " ".join(console.file.getvalue().split())
    assert "on chat" in text
    assert f"(bos {by_source['bos']:.4f}, chat {by_source['chat']:.4f})" in text


def test_sources_belong_to_a_runs_fingerprint(
    config: folora.FoLoraConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "folora")
    kept = Run(config).share().samples.manifest["fingerprint"]
    assert "1-samples/set: already done" in caplog.text
    assert config.output is not None
    changed = config.changed({"sampling.sources": {"bos": 0.25, "chat": 0.75}})
    other = Run(changed).share().samples
    assert other.manifest["fingerprint"] != kept
    assert (Path(config.output) / "old" / "1-samples-1").exists()
    assert other.load().sources.count("chat") == 30


def test_a_base_file_records_its_sources(
    config: folora.FoLoraConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(config.replace(output=str(tmp_path / "run")))
    path = run.base(tmp_path / "base.safetensors")
    file = read_base_file(path, run.context.facts)
    assert file.manifest["sources"] == ["bos", "chat"]
    assert file.samples == run.samples()
    words = ["--model", str(config.model), "--dataset", str(config.dataset), "--device", "cpu"]
    words += ["--output", str(tmp_path / "other"), "--base", str(path), "--r", "4"]
    assert main(["run", *words, "--sampling.sources", "bos=1"]) == 2
    assert "has text of bos, chat, but sampling.sources asks for bos" in " ".join(
        capsys.readouterr().err.split()
    )
    assert main(["run", *words, "--sampling.sources", "bos=0.9,chat=0.1"]) == 2
    assert "has text of bos (50%), chat (50%), but sampling.sources asks for bos (90%), chat (10%)" in " ".join(
        capsys.readouterr().err.split()
    )  # fmt: skip
    same = config.replace(base=str(path), output=None)
    prepared = folora.prepare(make_llama(), make_tokenizer(chat=True), rows(), same)
    assert [*prepared.meter.read(prepared.model).kl_by_source] == ["bos", "chat"]
    equal = same.changed({"sampling.sources": {"chat": 0.5, "bos": 0.5}})
    assert (
        folora.prepare(make_llama(), make_tokenizer(chat=True), rows(), equal).samples
        == file.samples
    )
    asks = same.changed({"sampling.sources": {"bos": 1.0}})
    with pytest.raises(MismatchError, match="asks for bos"):
        folora.prepare(make_llama(), make_tokenizer(chat=True), rows(), asks)


def test_a_base_file_of_other_contents_is_refused(
    config: folora.FoLoraConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts without tools do not pass as those with tools, in a run, `prepare` or an export."""
    file = tmp_path / "prompts.jsonl"

    def write(tools: list[dict[str, str]]) -> None:
        asked = ({"prompt": f"add {n}", "tools": tools} for n in range(60))
        file.write_text("".join(json.dumps(row) + "\n" for row in asked))

    place = tmp_path / "model"
    make_llama().save_pretrained(place)
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.function.name }}.{% endfor %}" + str(
        tokenizer.chat_template
    )
    tokenizer.save_pretrained(place)
    write([])
    sources = {"bos": 0.5, f"prompts:{file}": 0.5}
    asks = config.changed(
        {"sampling.sources": sources, "model": str(place), "output": str(tmp_path / "run")}
    )
    run = Run(asks)
    path = run.base(tmp_path / "base.safetensors")
    based = asks.replace(base=str(path))
    copy = Run(based.replace(output=str(tmp_path / "copy"))).base(tmp_path / "copy.safetensors")
    for made in (path, copy):
        recorded = read_base_file(made, run.context.facts).manifest["contents"]
        assert [*recorded] == [f"prompts:{file}"]
    Run(based).check_command("run")
    write([{"name": "sum"}])
    message = "with other contents, but sampling.sources asks for the present ones"
    yaml, adapter = tmp_path / "run.yaml", Path(str(config.output)) / "5-adapter"
    for made in (path, copy):
        with pytest.raises(MismatchError, match=message):
            folora.prepare(
                make_llama(), tokenizer, rows(), based.replace(base=str(made), output=None)
            )
        yaml.write_text(based.replace(base=str(made), output=str(tmp_path / "other")).to_yaml())
        for command in (
            ["run"],
            ["export", "--adapter", str(adapter), "--to", str(tmp_path / "to")],
        ):
            assert main([*command, "--config", str(yaml)]) == 2
            assert message in " ".join(capsys.readouterr().err.split())
    Run(based.changed({"sampling.sources": None})).check_command("run")


def test_early_stopping_checks_read_the_mixture(config: folora.FoLoraConfig) -> None:
    early = config.replace(output=None, dataset=None).changed(
        {"sampling.num_sequences": 200, "sampling.tolerance": 1e6}
    )
    found = folora.prepare(make_llama(), make_tokenizer(chat=True), rows(), early).samples
    assert len(found.sources) == 60
    assert {name: len(part) for name, part in found.by_source().items()} == {"bos": 8, "chat": 8}
