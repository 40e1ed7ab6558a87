"""Interrupted training, damaged checkpoints and non-finite gradients: no bad state is ever loaded."""

from __future__ import annotations

import math
import resource
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import folora
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config
from folora.adapters.adapter import lora_factors
from folora.errors import ArtifactError, NumericsError
from folora.runtime.checkpoints import SEAL, check_checkpoint, latest_checkpoint
from folora.runtime.finiteness import first_non_finite_module, non_finite_gradients
from folora.runtime.signals import Interrupted, interruptible
from folora.runtime.storage import write_sealed
from folora.training.train import train

STATES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def prepared(**changes: Any) -> folora.Prepared:
    return folora.prepare(make_llama(), make_tokenizer(), rows(), tiny_config(**changes))


def flat(p: folora.Prepared) -> torch.Tensor:
    return torch.cat([t.flatten() for a, b, _ in lora_factors(p.model).values() for t in (a, b)])


def moments(p: folora.Prepared) -> list[torch.Tensor]:
    states = p.optimizer.state_dict()["state"].values()
    return [t.clone() for state in states for t in state.values()]


class At(TrainerCallback):
    """Runs a function in the middle of a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.act()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[folora.Prepared, Path]:
    """An uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    found = prepared()
    train(found, make_tokenizer(), folder)
    return found, folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_with_a_checkpoint(
    tmp_path: Path, whole: tuple[folora.Prepared, Path], number: signal.Signals
) -> None:
    former = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    cut = prepared(training={"save_steps": 100})
    with pytest.raises(Interrupted) as stopped:
        train(
            cut, make_tokenizer(), tmp_path, callbacks=[At(3, lambda: signal.raise_signal(number))]
        )
    assert stopped.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == former
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    again = prepared(training={"save_steps": 100})
    assert train(again, make_tokenizer(), tmp_path).state.global_step == 6
    assert torch.equal(flat(again), flat(whole[0]))
    assert all(map(torch.equal, moments(again), moments(whole[0])))


def test_an_interrupt_wrapped_by_native_code_is_an_interrupt() -> None:
    with pytest.raises(Interrupted) as stopped, interruptible():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type") from None
    assert stopped.value.exit_code == 143
    with pytest.raises(ValueError, match="of its own"), interruptible():
        raise ValueError("of its own")


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(prepared(), make_tokenizer(), tmp_path, callbacks=[At(1, twice)])
    assert latest_checkpoint(tmp_path) is None


def test_training_in_another_thread_installs_no_signal_handler(tmp_path: Path) -> None:
    steps = []

    def work() -> None:
        steps.append(train(prepared(), make_tokenizer(), tmp_path).state.global_step)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert steps == [6]


def test_resuming_from_the_last_checkpoint_takes_no_step(tmp_path: Path) -> None:
    """As if killed between the last checkpoint and the result; transformers' Trainer would take another step."""
    constant: Any = {"training": {"lr_scheduler_type": "constant"}}
    first, again = prepared(**constant), prepared(**constant)
    train(first, make_tokenizer(), tmp_path)
    trainer = train(again, make_tokenizer(), tmp_path)
    assert trainer.state.global_step == 6
    assert torch.equal(flat(again), flat(first))
    assert trainer.read()[0].kl > 0


@pytest.mark.parametrize("file", [*STATES, "trainer_state.json", SEAL])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_refused(
    tmp_path: Path, whole: tuple[folora.Prepared, Path], file: str, damage: str
) -> None:
    shutil.copytree(whole[1], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-6" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    if (file, damage) == (SEAL, "gone"):  # an incomplete checkpoint
        assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"
        return
    with pytest.raises(ArtifactError, match=f"checkpoint-6/{file}"):
        latest_checkpoint(tmp_path / "run")
    shutil.rmtree(path.parent)
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"


def test_a_file_added_to_a_checkpoint_is_refused(
    tmp_path: Path, whole: tuple[folora.Prepared, Path]
) -> None:
    shutil.copytree(whole[1] / "checkpoint-6", tmp_path / "checkpoint-6")
    check_checkpoint(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"adapter_model\.bin was not written by this training"):
        check_checkpoint(tmp_path / "checkpoint-6")


@pytest.mark.parametrize("size", [4000, 30000])
def test_a_full_disk_while_saving_a_checkpoint_is_named(
    tmp_path: Path, whole: tuple[folora.Prepared, Path], size: int
) -> None:
    """It fails while writing the adapter or the optimizer's state."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))

    try:
        with pytest.raises(ArtifactError, match=r"cannot write the checkpoint .*checkpoint-4: "):
            train(prepared(), make_tokenizer(), tmp_path, callbacks=[At(4, fill)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    again = prepared()
    train(again, make_tokenizer(), tmp_path)
    assert torch.equal(flat(again), flat(whole[0]))


class Poisoned:
    """Makes the loss of chosen steps NaN by a weight of the frozen model, then restores the weight."""

    def __init__(self, p: folora.Prepared, steps: range | set[int]) -> None:
        layer: Any = p.model.get_base_model()
        self.weight = layer.model.layers[1].mlp.down_proj.base_layer.weight.data
        self.good, self.steps, poisoned = self.weight.clone(), steps, self

        class Callback(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                poisoned.set(state.global_step + 1 in steps)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                poisoned.set(False)

        self.callback = Callback()

    def set(self, bad: bool) -> None:
        self.weight.copy_(self.good)
        if bad:
            self.weight[3, 5] = math.inf


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_stops_before_a_non_finite_gradient(tmp_path: Path, accumulation: int) -> None:
    training = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2}
    p = prepared(training=training)
    seen: list[Any] = []
    bad = Poisoned(p, {5})
    note = At(5, lambda: seen.extend([flat(p).clone(), moments(p)]))
    with pytest.raises(NumericsError) as stopped:
        train(p, make_tokenizer(), tmp_path, callbacks=[bad.callback, note])
    said = str(stopped.value)
    assert "step 5: " in said
    assert (
        "model.layers.1.mlp.down_proj.base_layer is the first module with a non-finite output"
        in said
    )
    assert "lora_" in said
    assert "lower training.learning_rate (now 0.01)" in said
    assert torch.equal(flat(p), seen[0])
    assert all(map(torch.equal, moments(p), seen[1]))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_non_finite_gradients_are_found() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False))
    for value in (0.0, 1e14, 1e16, math.inf, math.nan):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model[1].weight.grad[1, 2] = value  # type: ignore[index,union-attr]
        assert non_finite_gradients(model) == ([] if value < 1e15 else ["1.weight"])
    model.zero_grad()
    assert non_finite_gradients(model) == []


def test_finding_the_non_finite_layer_changes_nothing_and_removes_its_hooks() -> None:
    model = make_llama()
    ids = torch.tensor([[1, 2, 3]])
    assert "the forward pass is finite" in first_non_finite_module(model, {"input_ids": ids})
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = math.nan
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert "model.layers.0.self_attn.v_proj is the first" in first_non_finite_module(
        model, {"input_ids": ids}
    )
    assert all(
        torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in model.named_parameters()
    )
    assert not any(m._forward_hooks for m in model.modules())


def test_the_layer_of_an_fp16_overflow_is_named() -> None:
    model = make_llama().half()
    model.model.layers[1].mlp.down_proj.weight.data.fill_(3e4)
    said = first_non_finite_module(model, {"input_ids": torch.tensor([[1, 2, 3]])})
    assert "model.layers.1.mlp.down_proj is the first" in said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "has no entry 'files'"),
        ({"files": 3}, "has unexpected contents"),
        ({"files": ["a"]}, "has unexpected contents"),
        ({"files": {"a": None}}, "checkpoint-2/a is damaged"),
        ({"files": {"a": "x", "../checkpoint-1/b": "x"}}, "checkpoint-1/b is missing|a is damaged"),
        ({"files": {"\0": "x"}}, "is missing"),
        ({"files": {"x" * 300: "x"}}, "is missing"),
        ({"files": {"\ud800": "x"}}, "is missing"),
        ({"files": {"": "x", ".": "x"}}, "is missing"),
    ],
)
def test_an_invalid_checkpoint_seal_is_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    """With a correct checksum; no file outside the checkpoint is read."""
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "a").write_text("a")
    write_sealed(tmp_path / "checkpoint-2" / SEAL, values)
    with pytest.raises(ArtifactError, match=message):
        latest_checkpoint(tmp_path)
