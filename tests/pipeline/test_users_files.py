"""A folder with a user's own files in it, and every command that writes there: nothing is lost.

Each case puts files somewhere and gives one command. Whatever the command does, what was put there is
the same afterwards, byte for byte. A refusal names the path, comes before the model is loaded, and
leaves everything as it was.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.users_files import (
    Put,
    appended,
    both,
    fifo,
    file,
    folder_of,
    link,
    read_only,
    snapshot,
    socket_at,
    weights,
)
from transformers import AutoModelForCausalLM

import folora.pipeline.context
from benchmarks.paper.__main__ import main as paper
from benchmarks.tiny import make_llama
from folora.cli.main import main
from folora.config import FoLoraConfig
from folora.errors import ConfigError
from folora.pipeline.run import Run
from folora.runtime.ownership import LIST, write_owned_folder
from folora.runtime.storage import LOCK

STAGES = ["1-samples", "2-statistics", "3-spectrum", "4-training", "5-adapter"]
WEIGHTS = "model.safetensors"


def stock_adapter(name: str) -> Put:
    """An adapter that PEFT wrote, with its card."""

    def put(here: Path) -> None:
        model = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(str(here / name))

    return put


def base_file(name: str) -> Put:
    """A base file of folora's, made from the run in HERE."""

    def put(here: Path) -> None:
        config = FoLoraConfig.from_yaml(here / "run" / "config.yaml")
        Run(config.changed({"output": str(here / "run")})).base(here / name)

    return put


@dataclass(frozen=True)
class Case:
    """One command in a folder with a user's files.

    Attributes:
        name: What is there.
        put: Puts it into HERE, which holds ``model`` and, if `finished`, ``run``.
        words: The command; HERE is replaced.
        refused: Pattern that the refusal contains; None if the command must succeed.
        finished: Whether HERE/run is a finished run.
        ours: What the command may change although `put` made it: folora's own files.
    """

    name: str
    put: Put
    words: str
    refused: str | None
    finished: bool = True
    ours: tuple[str, ...] = field(default=())


def new(name: str, put: Put, refused: str, words: str = "run --output HERE/out") -> Case:
    """A command that begins a new output."""
    return Case(name, put, words, refused, finished=False)


RUN = "run --output HERE/run"
EXPORT = "export --output HERE/run"
BASE = "base --output HERE/run"
COMPARE = "compare --methods lora --learning-rates 1e-3 --output HERE/run"

REFUSED = [
    # base
    Case("a folder", file("theirs/notes.txt"), f"{BASE} --to HERE/theirs", "HERE/theirs is a folder"),
    Case("weights", weights(WEIGHTS), f"{BASE} --to HERE/{WEIGHTS}", f"HERE/{WEIGHTS} would be replaced, but"),
    Case("a text", file("a.txt"), f"{BASE} --to HERE/a.txt", "HERE/a.txt would be replaced, but"),
    Case("a protected file", both(file("a.txt"), read_only("a.txt")), f"{BASE} --to HERE/a.txt",
         "HERE/a.txt is read-only"),
    Case("a link", both(weights("x"), link("l", "x")), f"{BASE} --to HERE/l", "HERE/l is a symbolic link"),
    Case("a broken link", link("l", "x"), f"{BASE} --to HERE/l", "HERE/l is a symbolic link"),
    Case("a FIFO", fifo("pipe"), f"{BASE} --to HERE/pipe", "HERE/pipe is not a regular file"),
    Case("a socket", socket_at("s"), f"{BASE} --to HERE/s", "HERE/s is not a regular file"),
    Case("the folder itself", file("a.txt"), f"{BASE} --to .", "HERE is a folder"),
    Case("a long name", file("a.txt"), f"{BASE} --to HERE/{'x' * 240}", "too long"),
    Case("the file that is read", base_file("b"), f"{BASE} --base HERE/b --to HERE/b",
         "HERE/b is the base file that is read"),
    Case("a base file that was damaged", both(base_file("b"), lambda here: os.truncate(here / "b", 99)),
         f"{BASE} --to HERE/b", "HERE/b would be replaced, but"),
    Case("base in the model", file("a.txt"), f"{BASE} --model HERE/model --to HERE/model/b.safetensors",
         "is in the model.s folder"),
    Case("weights in the output", weights("run/base.safetensors"), BASE, r"run/base\.safetensors would be replaced"),
    # export
    Case("a stock adapter", stock_adapter("a"), f"{EXPORT} --to HERE/a", r"HERE/a holds '\w.*', and no folora.json"),
    Case("the model", file("a.txt"), f"{EXPORT} --to HERE/model", "HERE/model holds"),
    Case("the model, merged", file("a.txt"), f"{EXPORT} --merged --to HERE/model", "HERE/model holds"),
    Case("export to the run", file("a.txt"), f"{EXPORT} --to HERE/run", "kind 'run', not 'adapter'"),
    Case("export to a stage", file("a.txt"), f"{EXPORT} --to HERE/run/4-training", "4-training holds"),
    Case("export to a checkpoint", file("a.txt"), f"{EXPORT} --to HERE/run/4-training/checkpoint-6",
         r"checkpoint-6/folora\.json says"),
    Case("merged over the adapter", file("a.txt"), f"{EXPORT} --merged --to HERE/run/5-adapter",
         "kind 'adapter', not 'merged'"),
    Case("an adapter's changed config", appended("run/5-adapter/adapter_config.json", " "), EXPORT,
         r"5-adapter/adapter_config\.json .*was changed since folora wrote it"),
    Case("an adapter's protected file", read_only("run/5-adapter/adapter_config.json"), EXPORT,
         r"5-adapter/adapter_config\.json is read-only"),
    Case("a folder named merged", file("run/merged/a"), f"{EXPORT} --merged", "run/merged holds 'a'"),
    Case("a link named merged", both(file("m/a"), link("run/merged", "m")), f"{EXPORT} --merged",
         "run/merged is a symbolic link"),
    Case("a file named merged", file("run/merged"), f"{EXPORT} --merged", "run/merged is a file"),
    Case("export to a FIFO", fifo("pipe"), f"{EXPORT} --to HERE/pipe", "HERE/pipe"),
    Case("a list of somebody else's", both(file("a/x"), file("a/folora.json", "{}")), f"{EXPORT} --to HERE/a",
         r"HERE/a/folora\.json"),
    # run, on a finished run
    Case("a changed adapter", appended("run/5-adapter/adapter_config.json", " "), RUN,
         r"5-adapter/adapter_config\.json .*was changed"),
    Case("a changed config", appended("run/config.yaml", "seed: 1"), RUN, r"run/config\.yaml .*was changed"),
    Case("a changed report", appended("run/report.json", " "), RUN, r"run/report\.json .*was changed"),
    Case("an adapter without a list", lambda here: (here / "run/5-adapter" / LIST).unlink(), RUN,
         "5-adapter holds 'adapter_config.json', and no folora.json"),
    Case("a checkpoint of others", file("run/4-training/checkpoint-500/x"), f"{RUN} --lr 1e-4",
         "checkpoint-500 was not written by this training"),
    Case("a checkpoint as a link", both(file("c/x"), link("run/4-training/checkpoint-8", "c")), f"{RUN} --lr 1e-4",
         "checkpoint-8 is a symbolic link"),
    Case("checkpoints without a request", lambda here: (here / "run/4-training/request.json").unlink(), RUN,
         r"4-training/checkpoint-\d was not written by this training .*request\.json"),
    # run, on a new output
    new("the config that is read", file("config.yaml", "seed: 1\n"), r"HERE/config\.yaml would be replaced",
        "run --config HERE/config.yaml --output HERE"),
    new("a folder named config.yaml", file("out/config.yaml/a"), r"out/config\.yaml is a folder"),
    new("a FIFO named config.yaml", fifo("out/config.yaml"), r"out/config\.yaml is not a regular file"),
    new("a link named config.yaml", both(file("c", "seed: 1"), link("out/config.yaml", "c")),
        r"out/config\.yaml is a symbolic link"),
    new("a report", file("out/report.json", "{}"), r"out/report\.json would be replaced"),
    new("a list", file("out/folora.json", "{}"), r"out/folora\.json has format version"),
    new("a folder for a list", file("out/folora.json/a"), r"out/folora\.json is a folder"),
    new("an adapter", stock_adapter("out/5-adapter"), "5-adapter holds"),
    new("a card alone", file("out/5-adapter/README.md"), "5-adapter holds 'README.md'"),
    new("a file named old", file("out/old"), "out/old is a file"),
    new("a link named old", both(file("o/a"), link("out/old", "o")), "out/old is a symbolic link"),
    *(new(f"{stage} as a link", both(file("far/a"), link(f"out/{stage}", "far")), f"{stage} is a symbolic link")
      for stage in STAGES),
    *(new(f"{stage} as a file", file(f"out/{stage}"), f"{stage} is a file") for stage in STAGES),
    *(new(f"others' files in {part}", file(f"out/{part}/a"), rf"{part}/manifest\.json is missing")
      for part in ("1-samples/set", "2-statistics/pre", "2-statistics/task", "3-spectrum", "4-training/result")),
    new("others' request", file("out/1-samples/request.json", "{}"), r"1-samples/request\.json has format"),
    new("a FIFO for a request", fifo("out/4-training/request.json"), r"4-training/request\.json is a named pipe"),
    new("others' checkpoints", file("out/4-training/checkpoint-3/x"), "checkpoint-3 was not written by this"),
    new("a lock of others", file(f"out/{LOCK}"), f"{LOCK} is not empty"),
    new("a link for a lock", both(file("far"), link(f"out/{LOCK}", "far")), f"{LOCK} is a symbolic link"),
    new("the model as output", file("a.txt"), "HERE/model is the folder of the model",
        "run --model HERE/model --output HERE/model"),
    # compare
    Case("a table", file("run/compare/comparison.md"), COMPARE, r"compare/comparison\.md would be replaced"),
    Case("a picture", file("run/compare/frontier.png"), COMPARE, r"compare/frontier\.png would be replaced"),
    Case("no results", file("run/compare/results.jsonl", "{}"), COMPARE,
         r"results\.jsonl, line 1 is not a result"),
    Case("a folder for results", file("run/compare/results.jsonl/a"), COMPARE, r"results\.jsonl is a folder"),
    Case("half a line of results", file("run/compare/results.jsonl", "{"), COMPARE,
         r"results\.jsonl, line 1 cannot be read"),
    Case("a result of an older folora", file("run/compare/lora--seed=0.json", "{}"), COMPARE,
         r"lora--seed=0\.json is a result of an older folora"),
    Case("a file named compare", file("run/compare"), COMPARE, "run/compare is a file"),
    Case("a link named compare", both(file("c/a"), link("run/compare", "c")), COMPARE,
         "run/compare is a symbolic link"),
]  # fmt: skip

HIDDEN = [".env.local", ".env.d/x", ".config.yaml.swp", ".report.json.bak", ".report.json.1a2b3c4d"]
AMONG = both(*map(file, (
    *(f"run/{name}" for name in HIDDEN), "run/notes.txt", "run/old/a", "run/base.safetensors",
    "run/merged/a", "run/compare/comparison.md", "run/.5-adapter.0a1b2c3d/a", "run/.lock",
    "run/5-adapter/README.md", "run/5-adapter/tokenizer.json", "run/5-adapter/sub/a",
    "run/5-adapter/.adapter_config.json.swp", "run/4-training/README.md", "run/4-training/a",
    "run/4-training/checkpoint-4-backup/a", "run/4-training/checkpoint-best/a", "run/3-spectrum/a",
)))  # fmt: skip
"""Names of a user's own in all the places where a run writes."""

KEPT = [
    Case("among a finished run", AMONG, RUN, None),
    Case("a config with a comment", appended("run/config.yaml", "\n# mine\n"), RUN, None),
    Case("a config of the user's", both(file("run/README.md"), appended("run/config.yaml", "\n# mine\n")),
         "run --config HERE/run/config.yaml", None),
    Case("beside an exported adapter", both(file("run/5-adapter/README.md"), file("run/5-adapter/s/a")),
         f"{EXPORT} --rank 2", None),
    Case("export into an empty folder", lambda here: (here / "e").mkdir(), f"{EXPORT} --to HERE/e", None),
    Case("a hard link", lambda here: os.link(here / "run/5-adapter/adapter_model.safetensors", here / "copy"),
         f"{EXPORT} --rank 2", None),
    Case("beside a base file", both(file(".b.bak"), file(".b.0123abcd"), base_file("b")),
         f"{BASE} --to HERE/b", None, ours=("b", "run/")),
]  # fmt: skip


@pytest.fixture
def words(
    finished: FoLoraConfig, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Case], tuple[list[str], Path, set[str]]]:
    """Sets a case up; gives its command line, HERE, and the names of what is the user's there."""

    def set_up(case: Case) -> tuple[list[str], Path, set[str]]:
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        shutil.copytree(model_folder, here / "model")
        if case.finished:
            shutil.copytree(str(finished.output), here / "run")
            config = finished.changed({"output": str(here / "run")})
            Run(config).write_config()  # a folder that was copied belongs to another output
            Run(config).report()
        before = snapshot(here)
        case.put(here)
        after = snapshot(here)
        theirs = {n for n, v in after.items() if before.get(n) != v and not n.startswith(case.ours)}
        command, *rest = shlex.split(case.words.replace("HERE", str(here)))
        if "--config" not in rest:
            file = tmp_path / "options.yaml"
            file.write_text(finished.changed({"output": None}).to_yaml())
            rest = ["--config", str(file), *rest]
        elif "--config HERE/run" not in case.words:
            rest += ["--model", str(model_folder), "--dataset", str(finished.dataset)]
        return [command, *rest], here, theirs

    return set_up


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case.words.split()[0]}: {case.name}")
def test_overwriting_a_users_file_is_refused(
    case: Case, words: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, here, _ = words(case)
    before, loaded = snapshot(here), []
    monkeypatch.setattr(
        folora.pipeline.context, "load_model", lambda *args, **_: loaded.append(args)
    )
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    message = said[said.rindex("folora: ") :]
    assert "Traceback" not in said
    assert re.search(str(case.refused).replace("HERE", re.escape(str(here))), message), message
    assert loaded == []
    assert snapshot(here) == before


@pytest.mark.parametrize("case", KEPT, ids=lambda case: f"{case.words.split()[0]}: {case.name}")
def test_users_files_among_ours_are_kept(case: Case, words: Any) -> None:
    command, here, theirs = words(case)
    before = snapshot(here)
    assert theirs
    assert main(command) == 0
    after = snapshot(here)
    assert {n: after.get(n) for n in theirs} == {n: before[n] for n in theirs}
    if case.words == RUN:  # nothing was to be done: all is as it was
        assert after == before


def test_a_whole_run_among_the_users_files(
    model_folder: Path, rows_file: Path, finished: FoLoraConfig, tmp_path: Path
) -> None:
    """In a folder in which someone works already, down to names that look like temporary ones."""
    names = [
        *HIDDEN, "README.md", "old/a", "merged/a", "compare/comparison.md", "base.safetensors", ".lock",
        ".3-spectrum.0a1b2c3d/a", ".4-training.partial", ".folora.json.swp", "model.safetensors",
        "1-samples/a", "4-training/README.md", "4-training/checkpoint-4-backup/a",
        "4-training/checkpoint-best/a", "4-training/runs/a",
    ]  # fmt: skip
    both(*map(file, names))(tmp_path)
    (tmp_path / "linked").symlink_to("README.md")
    before = snapshot(tmp_path)
    Run(finished.changed({"output": str(tmp_path)})).run()
    after = snapshot(tmp_path)
    assert {n: after.get(n) for n in before} == before
    assert (tmp_path / "5-adapter/adapter_model.safetensors").read_bytes() == (
        Path(str(finished.output)) / "5-adapter/adapter_model.safetensors"
    ).read_bytes()


def test_exported_folders_load_everywhere(finished: FoLoraConfig, tmp_path: Path) -> None:
    """The list beside the files is no hindrance to PEFT and transformers, nor are the user's files."""
    run = Run(finished)
    for kind in ("adapter", "merged"):
        for _ in range(2):
            run.export(tmp_path / kind, kind=kind)  # type: ignore[arg-type]
            file(f"{kind}/README.md")(tmp_path)
        assert (tmp_path / kind / "README.md").read_text() == "mine"
    base = AutoModelForCausalLM.from_pretrained(str(finished.model))
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits)


def test_a_file_in_the_way_of_an_export_is_named_before_anything_is_deleted(tmp_path: Path) -> None:
    """A name that was not among the former files, as a tokenizer put beside merged weights."""
    write_owned_folder(tmp_path / "m", "merged", folder_of({"config.json": "1"}))
    file("m/tokenizer.json")(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"m/tokenizer\.json would be replaced"):
        write_owned_folder(
            tmp_path / "m", "merged", folder_of({"config.json": "2", "tokenizer.json": "2"})
        )
    assert snapshot(tmp_path) == before


def test_a_trial_deletes_no_folder_of_the_users(tmp_path: Path) -> None:
    file("dry-run/notes.txt")(tmp_path)
    recipe = "benchmarks/paper/recipes/llama2-7b-math.yaml"
    assert paper(["--recipe", recipe, "--output", str(tmp_path), "--dry-run"]) == 2
    assert (tmp_path / "dry-run/notes.txt").read_text() == "mine"


def test_the_report_lists_the_files_of_the_run(finished: FoLoraConfig) -> None:
    folder = Path(str(finished.output))
    listed = json.loads((folder / LIST).read_text())["files"]
    assert sorted(listed) == ["config.yaml", "report.json"]
    assert sorted(json.loads((folder / "5-adapter" / LIST).read_text())["files"]) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
