"""Several processes match one, and no process waits for another that has failed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from support.processes import in_processes

import folora
from benchmarks.distributed.__main__ import breaches
from benchmarks.distributed.runs import ROUNDING, WAYS, Bench, by_fsdp2, ended
from benchmarks.distributed.trials import (
    interrupted,
    killed,
    mixed,
    other_ways,
    refused,
    same_as_one,
)
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config
from folora.cli.main import main
from folora.errors import ConfigError, DataError, MismatchError, ProcessError
from folora.pipeline.training import Training
from folora.runtime import distributed
from folora.runtime.checkpoints import latest_checkpoint
from folora.runtime.tensors import full_tensor

NOTHING: dict[str, Any] = {
    "same": {}, "ways": {}, "mixed": {}, "killed": [], "interrupted": [], "refused": {}, "launched": {}
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("distributed"))


def test_two_processes_match_one(bench: Bench) -> None:
    found = same_as_one(bench, (2,))
    assert list(found["2"]) == list(ROUNDING)
    assert breaches({**NOTHING, "same": found}) == []
    assert found["2"]["4-training/result"] > 0  # otherwise the runs would be identical


def test_a_mixture_of_sources_has_the_shares_and_sequences_of_one_process(bench: Bench) -> None:
    """By DDP, and with sharded weights, of which each process needs the others' part at each token."""
    found = mixed(bench, (2,))
    assert [*found] == ["2 by DDP", "2 by --shard"]
    assert breaches({**NOTHING, "mixed": found}) == []


def test_padding_rows_of_the_last_step_do_not_count(bench: Bench) -> None:
    """36 rows in steps of 8: process 1 has only padding rows in the fifth. Counting them changes it by 14 %."""
    masked = {"method.masked_kl_weight": 0.1}  # a mean over rows that are not padding
    for name, count, size in (("short", 1, 8), ("filled", 2, 4)):
        changes = {"training.per_device_train_batch_size": size, "training.max_steps": 5, **masked}
        assert not any(e.code for e in ended(bench.start(name, count, **changes)))
    assert 0 < bench.difference("short", "filled", Training.path) < 5 * ROUNDING[Training.path]


def test_a_budget_is_kept_by_several_processes(bench: Bench) -> None:
    """Each reads other texts; all have the same weight of the anchor and the same scale."""
    budget = {"budget": 1e-4, "anchor": 0.4, "training.learning_rate": 3e-2}
    for way in ("DDP", "FSDP2"):
        prepare, changes = WAYS[way]
        forks = bench.start(f"budget-{way}", 2, prepare=prepare, **changes, **budget)
        assert not any(e.code for e in ended(forks))
    assert bench.difference("budget-DDP", "budget-FSDP2", Training.path) < 1e-3
    fit = json.loads((bench.place / "budget-DDP" / "report.json").read_text())["budget"][0]
    assert fit["kept"]["upper"] <= 1e-4 and 0 < fit["scale"] < 1


def test_a_killed_process_ends_the_others_and_the_run_resumes(bench: Bench) -> None:
    found = [killed(bench, 2, 1, 2), killed(bench, 2, 0, 1)]
    assert breaches({**NOTHING, "killed": found}) == []
    assert all(one["checkpoint"] for one in found)
    assert all(one["seconds"] < 30 for one in found)


def test_a_signal_stops_all_processes_after_the_same_step(bench: Bench) -> None:
    found = [interrupted(bench, 2)]
    assert breaches({**NOTHING, "interrupted": found}) == []


def test_processes_with_different_inputs_are_refused(bench: Bench) -> None:
    found = refused(bench)
    assert len(found) == 3
    assert breaches({**NOTHING, "refused": found}) == []


def test_an_error_in_one_process_ends_all(bench: Bench) -> None:
    """A file that only process 1 cannot read, and a fork that exits at once."""
    missing = {1: ["--dataset", str(bench.place / "missing.jsonl")]}
    found = ended(bench.start("missing", 2, missing))
    assert [e.code for e in found] == [2, 2]
    assert "does not exist" in found[1].said
    assert "lost the connection to another process" in " ".join(found[0].said.split())
    assert all("Traceback" not in e.said for e in found)


def test_compare_refuses_several_processes(bench: Bench) -> None:
    words = bench.words("compare", 2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bench, "words", lambda *args, **kwargs: ["compare", *words[1:]])
        found = ended(bench.start("compare", 2))
    assert [e.code for e in found] == [2, 2]
    # One may exit before the other reaches the check.
    assert any("works in one process" in " ".join(e.said.split()) for e in found)


# The collectives, each in three processes.


def test_shards_cover_every_item_once() -> None:
    found = in_processes(
        3, lambda: (distributed.world_size(), distributed.rank(), list(distributed.shard(range(8))))
    )
    assert found == [(3, 0, [0, 3, 6]), (3, 1, [1, 4, 7]), (3, 2, [2, 5])]


def test_all_reduce_sum_max_and_gather() -> None:
    def work() -> Any:
        total = distributed.all_reduce_(torch.tensor([1.0, distributed.rank()])).tolist()
        return (
            total,
            distributed.all_reduce_max(5 - distributed.rank()),
            distributed.all_gather(distributed.rank() ** 2),
            distributed.broadcast(distributed.rank(), 2),
        )

    assert in_processes(3, work) == [([3.0, 3.0], 5, [0, 1, 4], 2)] * 3


def raising(at: int, error: Exception) -> Callable[[], str]:
    def call() -> str:
        if distributed.rank() == at:
            raise error
        return f"from {distributed.rank()}"

    return call


def test_all_processes_raise_the_error_of_one() -> None:
    found = in_processes(3, lambda: distributed.raise_together(raising(1, DataError("row 7"))))
    assert found == ["DataError: row 7"] * 3
    assert in_processes(3, lambda: distributed.raise_together(raising(9, DataError("")))) == [
        "from 0", "from 1", "from 2",
    ]  # fmt: skip


def test_only_rank_zero_works_and_all_ranks_get_the_result() -> None:
    assert (
        in_processes(3, lambda: distributed.on_rank_zero(raising(1, DataError(""))))
        == ["from 0"] * 3
    )
    found = in_processes(3, lambda: distributed.on_rank_zero(raising(0, ConfigError("no"))))
    assert found == ["ConfigError: no"] * 3


def test_every_process_names_the_difference() -> None:
    found = in_processes(3, lambda: distributed.check_same("data set", distributed.rank() == 2))
    assert found == [
        "MismatchError: process 2 of 3 has another data set than process 0. Start all with the same "
        "command, files and versions."
    ] * 3  # fmt: skip
    assert in_processes(2, lambda: distributed.check_same("data set", "x")) == [None, None]


def test_waiting_for_a_dead_process_raises() -> None:
    def work() -> Any:
        if distributed.rank() == 1:
            return "gone"
        return distributed.all_gather(0)

    found = in_processes(2, work)
    assert found[1] == "gone"
    assert found[0].startswith(
        "ProcessError: process 0 of 2 lost the connection to another process"
    )


def test_an_unreachable_process_group_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("connection reset by peer\nmore")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ProcessError, match=r"process 1 of 2 cannot reach .*reset by peer$"):
        distributed.init("cpu")


def test_a_single_process_communicates_nothing() -> None:
    assert distributed.all_gather(3) == [3]
    assert (
        distributed.broadcast(3)
        == distributed.all_reduce_max(3)
        == distributed.on_rank_zero(lambda: 3)
        == distributed.raise_together(lambda: 3)
        == 3
    )
    assert distributed.shard([1, 2]) == [1, 2]
    distributed.check_same("anything", object())
    with pytest.raises(MismatchError):
        distributed.raise_together(raising(0, MismatchError("x")))
    with (
        pytest.raises(RuntimeError, match="gloo") as raised,
        distributed.reporting_lost_processes(),
    ):
        raise RuntimeError("gloo")  # with one process there is no other to lose
    assert not isinstance(raised.value, ProcessError)


def test_other_strategies_match_ddp(bench: Bench) -> None:
    found = other_ways(bench, (2,))
    assert breaches({**NOTHING, "ways": found}) == []
    assert found["FSDP2"]["2"] > 0  # another order of summation
    assert found["--shard"]["2"] == 0  # the sum of two numbers has one order


def test_a_fsdp2_run_resumes_with_one_process(bench: Bench) -> None:
    stopped = [killed(bench, 2, 1, 1, "FSDP2")]
    assert breaches({**NOTHING, "killed": stopped}) == []
    name = bench.undisturbed(2, "FSDP2")
    folder = latest_checkpoint(bench.place / name / "4-training")
    assert folder is not None
    parts = {p.name for p in (folder / "optimizer_0").iterdir()}
    assert parts == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    # A checkpoint is an adapter that PEFT reads, even if weights are sharded.
    last = load_file(folder / "adapter_model.safetensors")
    result = bench.tensors(name, Training.path)
    a = next(iter(result)).removesuffix("/A").removesuffix("/B")
    assert torch.equal(last[f"base_model.model.{a}.lora_A.weight"], result[f"{a}/A"])


def test_a_sharded_model_is_saved_with_its_modules_to_save(tmp_path: Path) -> None:
    def work() -> Any:
        by_fsdp2(distributed.rank())
        p = folora.prepare(make_llama(), make_tokenizer(), rows(), tiny_config())
        config = LoraConfig(r=4, task_type="CAUSAL_LM", modules_to_save=["norm"])
        model = folora.attach(p.model.unload(), p.bases, config)  # type: ignore[arg-type]
        optimizer = folora.optimizer(model, p.bases, lr=0.1)
        args = folora.sft_config(p.config, tmp_path / "steps", evaluates=False, on_cpu=True)
        p = replace(p, model=model, optimizer=optimizer)
        trainer = folora.FoLoraTrainer(p, args, make_tokenizer())
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        found = model.base_model.model.model.norm.modules_to_save["default"].weight
        return full_tensor(found.detach()).tolist()

    trained, other = in_processes(2, work)
    assert trained == other and max(abs(w - 1) for w in trained) > 1e-3
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert saved["base_model.model.model.norm.weight"].tolist() == trained
    assert len([name for name in saved if "lora_" not in name]) == 5  # PEFT takes every norm


def test_a_run_with_a_sharded_base_resumes_without_sharding(bench: Bench) -> None:
    """Checkpoints, moments and fingerprints equal those of an unsharded base."""
    stopped = [killed(bench, 2, 1, 2, "--shard", "DDP")]
    assert breaches({**NOTHING, "killed": stopped}) == []
    names = bench.undisturbed(1), bench.undisturbed(2, "--shard")
    one, other = (bench.place / name for name in names)
    requests = [json.loads((p / "4-training" / "request.json").read_text()) for p in (one, other)]
    assert requests[0]["model"] == requests[1]["model"]


def test_initialization_from_weights_works_with_sharded_weights(bench: Bench) -> None:
    changes = {"method.init": "null_space", "method.constraint": "oplora", "dtype": "bfloat16"}
    for name, shard in (("whole", False), ("parts", True)):
        assert [e.code for e in ended(bench.start(name, 2, shard=shard, **changes))] == [0, 0]
    assert bench.difference("whole", "parts", Training.path) == 0


def test_non_finite_sharded_weights_are_reported_by_all_processes(
    bench: Bench, tmp_path: Path
) -> None:
    shutil.copytree(bench.model, tmp_path / "model")
    model = make_llama()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[-1, -1] = float("nan")
    model.save_pretrained(tmp_path / "model")
    found = ended(bench.start("nan", 2, shard=True, model=str(tmp_path / "model")))
    assert [e.code for e in found] == [2, 2]
    assert all("model.layers.1.mlp.down_proj.weight" in " ".join(e.said.split()) for e in found)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight.fill_(1e38)
    model.save_pretrained(tmp_path / "model")
    found = ended(bench.start("large", 2, shard=True, model=str(tmp_path / "model")))
    assert [e.code for e in found] == [2, 2]
    assert all("logits are not finite while sampling" in " ".join(e.said.split()) for e in found)


FLAT = "needs whole rows of the adapter's matrices"
REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "FSDP 1": ({"ACCELERATE_USE_FSDP": "true"}, {}, FLAT),
    "FSDP 1 by arguments": ({}, {"fsdp": "full_shard", "fsdp_config": {"version": 1}}, FLAT),
    "FSDP in one process": (
        {}, {"fsdp": "full_shard", "fsdp_config": {"version": 2}}, "fsdp needs several processes",
    ),
    "DeepSpeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, FLAT),
    "DeepSpeed by arguments": ({}, {"deepspeed": "zero2.json"}, FLAT),
    "FSDP's checkpointing": (
        {"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "True"},
        {}, "--training.gradient_checkpointing true",
    ),
    "FSDP's checkpointing by arguments": (
        {}, {"fsdp": "full_shard", "fsdp_config": {"activation_checkpointing": True}},
        "--training.gradient_checkpointing true",
    ),
    "FSDP with a sharded base": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"shard": True}, "without FSDP",
    ),
    "a quantized base with shard": ({}, {"shard": True, "quantize": "4bit"}, "with shard"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_options_that_lose_rows_are_refused_first(
    what: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables, given, message = REFUSED[what]
    # transformers sets it; monkeypatch restores it.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = bench.words("flat", 1)
    for name, value in given.items():
        words += [f"--{name}" if "shard" in given else f"--training.{name}"]
        words += [value if isinstance(value, str) else json.dumps(value)]
    assert main(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (bench.place / "flat").exists()
