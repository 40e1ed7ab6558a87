"""The LoRA update matches PEFT's values and gradients and saves one narrow input instead of wide copies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from support.adapted import IDS, bases_for, in_peft, saved_bytes
from torch import Tensor
from torch.nn.functional import linear
from transformers import TrainerCallback

import folora
from benchmarks.tiny import make_gpt2, make_llama, make_tokenizer, rows, tiny_config
from folora.adapters import low_rank
from folora.adapters.adapter import attach
from folora.adapters.low_rank import narrow_inputs, update

R = 4
CONFIG = LoraConfig(r=R, lora_alpha=R)


def plain(x: Tensor, a: Tensor, b: Tensor, scaling: float, trained: int | None = None) -> Tensor:
    if trained is None:
        return linear(linear(x.to(a.dtype), a) * scaling, b)
    first, rest = (a[:trained], b[:, :trained]), (a[trained:].detach(), b[:, trained:].detach())
    return plain(x, *first, scaling) + plain(x, *rest, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 10), (1, 1, 1, 10)])
@pytest.mark.parametrize("frozen", ["", "x", "a", "b"])
@pytest.mark.parametrize("trained", [None, 3])
@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_values_and_gradients_are_those_of_linear_layers(
    shape: tuple[int, ...], dtype: torch.dtype, frozen: str, trained: int | None, scaling: float
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
        out = function(**parts, scaling=scaling, trained=trained)
        (out * torch.linspace(-1, 1, 8)).sum().backward()
        assert out.dtype == torch.float32
        found.append([out.detach(), *(p.grad for p in parts.values() if p.requires_grad)])
    for own, other in zip(*found, strict=True):
        assert own.dtype == other.dtype
        if trained is None:
            assert torch.equal(own, other)
        # Linear layers round the gradient of x twice, for each part.
        torch.testing.assert_close(own, other, rtol=1e-5, atol=8 * torch.finfo(own.dtype).eps)


def test_gradients_in_float64() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, dtype=torch.float64) for s in ((3, 5), (2, 5), (4, 2)))
    assert torch.autograd.gradcheck(update, [t.requires_grad_() for t in (x, a, b)])
    assert torch.autograd.gradcheck(lambda x: update(x, a, b, 0.3, 1), [x])  # of both parts


def test_the_frozen_half_gets_no_gradient_and_cancels_exactly() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, a, b = (torch.randn(s).to(dtype) for s in ((7, 33), (3, 33), (65, 3)))
        a2, b2 = torch.cat([a, a]).requires_grad_(), torch.cat([b, -b], dim=1).requires_grad_()
        for kind in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
            with kind:
                out = update(x, a2, b2, 0.3, 3)
            assert not out.any()
            of_a, of_b = torch.autograd.grad(out.float().sum(), [a2, b2])
            assert of_a[:3].any() and of_b[:, :3].any()
            assert not of_a[3:].any() and not of_b[:, 3:].any()


def test_autocast_matches_two_linear_layers() -> None:
    x, a, b = torch.randn(6, 10), torch.randn(R, 10), torch.randn(8, R)
    with torch.autocast("cpu", torch.bfloat16):
        assert update(x, a, b).dtype == torch.bfloat16
        assert torch.equal(update(x, a, b), plain(x, a, b, 1.0))
        torch.testing.assert_close(update(x, a, b, 0.3, 3), plain(x, a, b, 0.3, 3))


def without_shape_checks() -> Callable[..., Tensor]:
    """`update` as users import it; the tests' import hook adds code that dynamo cannot trace."""
    spec = spec_from_file_location("unchecked_low_rank", low_rank.__file__)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.update


def test_the_update_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(s, requires_grad=True) for s in ((6, 10), (R, 10), (8, R))]
    compiled = torch.compile(without_shape_checks(), backend="aot_eager", fullgraph=True)
    for trained in (None, 3):
        found = [
            torch.autograd.grad(f(*parts, 0.5, trained).square().sum(), parts)
            for f in (update, compiled)
        ]
        for own, other in zip(*found, strict=True):
            torch.testing.assert_close(own, other)


def pair(
    make: Callable[[], Any], dtype: torch.dtype = torch.bfloat16
) -> tuple[PeftModel, PeftModel]:
    """The same adapter, once by `attach` and once as PEFT's own; B is not zero."""
    own = attach(make().to(dtype), bases_for(make()), CONFIG)
    torch.manual_seed(1)
    for name, parameter in own.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return own, in_peft(own, make().to(dtype))


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_training_is_the_same_with_less_activation_memory(make: Callable[[], Any]) -> None:
    own, theirs = pair(make)
    wide, loss, expected = saved_bytes(theirs)
    with narrow_inputs(own):
        narrow, own_loss, grads = saved_bytes(own)
    assert torch.equal(own_loss, loss)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        # Gradients of a shared input are summed in bf16, in another order.
        torch.testing.assert_close(
            grad, expected[name], rtol=0.05, atol=0.02 * float(grad.abs().max())
        )
    copies = sum(
        4 * IDS.numel() * layer.in_features
        for layer in theirs.modules()
        if isinstance(layer, LoraLayer)
    )
    # At most one narrow copy of each remains, and layers with the same input share it.
    assert wide - narrow >= copies / 2


def test_float32_matches_peft_bitwise() -> None:
    own, theirs = pair(make_llama, torch.float32)
    (_, loss, expected), (_, again, grads) = saved_bytes(theirs), saved_bytes(own)
    assert torch.equal(again, loss)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_an_update_with_a_frozen_half_saves_activation_memory() -> None:
    model = attach(
        make_llama().to(torch.bfloat16), bases_for(make_llama()), CONFIG, init="null_space"
    )
    wide, loss, expected = saved_bytes(model)
    model.zero_grad()
    with narrow_inputs(model):
        narrow, again, grads = saved_bytes(model)
    assert torch.equal(again, loss)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    assert narrow < wide


def casts(model: PeftModel) -> set[bool]:
    return {m.cast_input_dtype_enabled for m in model.modules() if isinstance(m, LoraLayer)}


def test_the_trainer_disables_input_casts_and_restores_them(tmp_path: Path) -> None:
    config = tiny_config(training={"max_steps": 2}, dtype="auto")
    p = folora.prepare(make_llama().to(torch.bfloat16), make_tokenizer(), rows(), config)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(casts(p.model))

    args = folora.sft_config(config, tmp_path, evaluates=False, on_cpu=True)
    folora.FoLoraTrainer(p, args, make_tokenizer(), callbacks=[Watch()]).train()
    assert seen == [{False}] * 2
    assert casts(p.model) == {True}


def test_input_casts_stay_enabled_for_other_active_adapters() -> None:
    model = attach(make_llama().to(torch.bfloat16), bases_for(make_llama()), CONFIG)
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
