"""The update is PEFT's in values and gradients, and keeps one narrow input where PEFT keeps wide copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from test_adapter import IDS, bases_for
from torch import Tensor
from torch.nn.functional import linear
from transformers import TrainerCallback

import folora
from benchmarks.tiny import make_gpt2, make_llama, make_tokenizer, rows, tiny_config
from folora.adapter import attach
from folora.lowrank import narrow_inputs, update

R = 4


def plain(
    x: Tensor, a: Tensor, b: Tensor, scaling: float, anchor: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    wide = x.to(a.dtype)
    moved = linear(linear(wide, a) * scaling, b)
    return moved if anchor is None else moved - plain(wide, *anchor, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 10), (1, 1, 1, 10)])
@pytest.mark.parametrize("frozen", ["", "x", "a", "b"])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_values_and_gradients_are_those_of_linear_layers(
    shape: tuple[int, ...], dtype: torch.dtype, frozen: str, anchored: bool, scaling: float
) -> None:
    found = []
    for function in (update, plain):
        torch.manual_seed(0)
        parts = {
            "x": torch.randn(shape).to(dtype),
            "a": torch.randn(R, 10),
            "b": torch.randn(8, R),
        }
        for name, part in parts.items():
            part.requires_grad_(name != frozen)
        anchor = (torch.randn(R, 10), torch.randn(8, R)) if anchored else None
        out = function(**parts, scaling=scaling, anchor=anchor)
        (out * torch.linspace(-1, 1, 8)).sum().backward()
        assert out.dtype == torch.float32
        found.append([out.detach(), *(p.grad for p in parts.values() if p.requires_grad)])
    for own, other in zip(*found, strict=True):
        assert own.dtype == other.dtype
        assert torch.equal(own, other)


def test_gradients_in_float64() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, dtype=torch.float64) for s in ((3, 5), (2, 5), (4, 2)))
    anchor = (a + 1, b - 1)
    for moved in (update, lambda x, a, b: update(x, a, b, 0.3, anchor)):
        assert torch.autograd.gradcheck(moved, [t.requires_grad_() for t in (x, a, b)])


def test_under_autocast_it_is_what_autocast_makes_of_two_linear_layers() -> None:
    x, a, b = torch.randn(6, 10), torch.randn(R, 10), torch.randn(8, R)
    with torch.autocast("cpu", torch.bfloat16):
        assert update(x, a, b).dtype == torch.bfloat16
        assert torch.equal(update(x, a, b), plain(x, a, b, 1.0))
        anchor = (torch.randn(R, 10), torch.randn(8, R))
        assert torch.equal(update(x, a, b, 0.3, anchor), plain(x, a, b, 0.3, anchor))


def test_it_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(s, requires_grad=True) for s in ((6, 10), (R, 10), (8, R))]
    compiled = torch.compile(update, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(f(*parts, 0.5).square().sum(), parts) for f in (update, compiled)]
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)


def kept_bytes(model: PeftModel) -> tuple[int, Tensor, dict[str, Tensor]]:
    """Bytes kept for the backward pass beside parameters, the loss, and gradients by name."""
    stores = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        stores.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        return t

    kept: list[Tensor] = []  # nothing is freed and its place taken before all are counted
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or pack(t), lambda t: t):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return sum(stores.values()), loss.detach(), grads


def pair(
    make: Callable[[], Any], dtype: torch.dtype = torch.bfloat16
) -> tuple[PeftModel, PeftModel]:
    """The same adapter, once by `attach` and once as PEFT's own; B is not zero."""
    own = attach(make().to(dtype), bases_for(make()), r=R)
    names = sorted(n for n, m in own.get_base_model().named_modules() if isinstance(m, LoraLayer))
    fan = isinstance(make(), type(make_gpt2()))
    config = LoraConfig(r=R, lora_alpha=R, target_modules=names, fan_in_fan_out=fan)
    theirs = get_peft_model(make().to(dtype), config)
    torch.manual_seed(1)
    for name, parameter in own.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    theirs.load_state_dict(own.state_dict(), strict=False)
    return own, theirs


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_a_model_learns_the_same_and_keeps_less(make: Callable[[], Any]) -> None:
    own, theirs = pair(make)
    wide, loss, expected = kept_bytes(theirs)
    with narrow_inputs(own):
        narrow, own_loss, grads = kept_bytes(own)
    assert torch.equal(own_loss, loss)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        # What flows back into a shared input is added up in bf16, in another order.
        torch.testing.assert_close(
            grad, expected[name], rtol=0.05, atol=0.02 * float(grad.abs().max())
        )
    copies = sum(
        4 * IDS.numel() * layer.in_features
        for layer in theirs.modules()
        if isinstance(layer, LoraLayer)
    )
    # At most a narrow one of each is left, and what layers share is kept once.
    assert wide - narrow >= copies / 2


def test_in_float32_it_is_peft_to_the_bit() -> None:
    own, theirs = pair(make_llama, torch.float32)
    (_, loss, expected), (_, again, grads) = kept_bytes(theirs), kept_bytes(own)
    assert torch.equal(again, loss)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_a_framed_update_keeps_less_too() -> None:
    model = attach(make_llama().to(torch.bfloat16), bases_for(make_llama()), r=R, init="null_space")
    wide, loss, expected = kept_bytes(model)
    model.zero_grad()
    with narrow_inputs(model):
        narrow, again, grads = kept_bytes(model)
    assert torch.equal(again, loss)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    assert narrow < wide


def casts(model: PeftModel) -> set[bool]:
    return {m.cast_input_dtype_enabled for m in model.modules() if isinstance(m, LoraLayer)}


def test_the_trainer_sees_to_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    config = tiny_config(training={"max_steps": 2})
    p = folora.prepare(make_llama().to(torch.bfloat16), make_tokenizer(), rows(), config)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(casts(p.model))

    args = folora.sft_config(config.training, tmp_path, evaluates=False, on_cpu=True)
    folora.FoLoraTrainer(p, args, make_tokenizer(), callbacks=[Look()]).train()
    assert seen == [{False}] * 2
    assert casts(p.model) == {True}


def test_other_adapters_get_the_inputs_that_they_need() -> None:
    model = attach(make_llama().to(torch.bfloat16), bases_for(make_llama()), r=R)
    with narrow_inputs(model):
        assert casts(model) == {False}
    assert casts(model) == {True}
    model.add_adapter("other", LoraConfig(r=R, target_modules=["q_proj"]))
    with narrow_inputs(model):
        assert casts(model) == {False}  # it is not active
    model.set_adapter("other")
    with narrow_inputs(model):
        assert casts(model) == {True}
        model(input_ids=IDS)
