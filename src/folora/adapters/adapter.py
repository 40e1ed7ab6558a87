"""Attach a LoRA adapter to the layers of a spectrum, and read its factors.

The model's output before the first step is exactly the base model's, and base weights are never modified. The
adapter is an ordinary PEFT LoRA adapter: saving, loading, copying, combining, disabling, merging and quantized
bases work as in PEFT. An initialization with B0 A0 /= 0 gives rank 2r, [B, -B0] [A; A0] (`variants`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from folora.adapters.constraint import ProtectedSpaces, protect_layer, protected_spaces
from folora.adapters.initialization import (
    INITIALIZATIONS,
    NONZERO,
    Initialization,
    Site,
    image_of,
    leading_singular_spaces,
    subtracts_weight,
)
from folora.adapters.lora_config import (
    check_lora_config,
    check_modules,
    lora_config,
    resolvable,
)
from folora.adapters.variants import FoLoraVariant, check_first_steps, layer_factors
from folora.calibration.inputs import linear_dims
from folora.errors import ConfigError, NumericsError
from folora.runtime.contexts import evaluating, gathered, keeping_requires_grad
from folora.runtime.tensors import full_tensor
from folora.spectral.layers import GroupBasis, check_rank

logger = logging.getLogger(__name__)

Factors = dict[str, tuple[Tensor, Tensor, float]]
"""A (k, d_in), B (d_out, k) and kappa by layer name; the layer's update is kappa B A."""


def attach(
    model: nn.Module,
    bases: Sequence[GroupBasis],
    config: LoraConfig | None = None,
    *,
    init: str = "eigen",
    protect: int = 0,
    seed: int = 0,
    adapter_name: str = "default",
) -> PeftModel:
    """Attach a LoRA adapter to the layers of `bases` and initialize it.

    The model's output is exactly unchanged until the first step. With an initialization in
    `initialization.NONZERO` the adapter has rank 2r in PEFT, [A; A0] and [B, -B0] with A0 and B0
    frozen; ``peft_config`` then has ``r=2r`` and a lora_alpha that keeps kappa unchanged.

    Args:
        model: The base model, for any task, or a PEFT model to which another adapter is added. Layers
            are wrapped in place, as by ``peft.get_peft_model``.
        bases: From `solve`.
        config: A ``peft.LoraConfig``; not modified. ``r``, ``lora_alpha``, ``lora_dropout``,
            ``use_rslora``, ``modules_to_save``, ``task_type``, ``base_model_name_or_path``,
            ``revision``, ``auto_mapping`` and ``inference_mode`` are supported as in PEFT.
            ``target_modules`` must be None or select exactly the layers of `bases`; all other fields
            must have their default. Default: ``LoraConfig(r=16, lora_alpha=16)``.
        init: One of `initialization.INITIALIZATIONS`: ``"eigen"`` (A0 spans the leading eigenvectors,
            B0 = 0), ``"null_space"`` (the paper's; needs a `null_basis` with at least r columns),
            ``"kaiming"`` (LoRA's default), or that of another method.
        protect: OPLoRA's k: number of leading singular directions of each weight that the update leaves
            unchanged, on both sides. 0 for none.
        seed: For ``"kaiming"``.
        adapter_name: Name in PEFT.

    Raises:
        ConfigError: A field of `config` is not supported (the message names it and the remedy) or does
            not fit the layers, the model lacks a layer of `bases`, r is larger than a layer's d_in,
            `init` is unknown, or the bases lack the null space. The model is then unchanged.
        NumericsError: A layer type ignores the initialization, so that its output would change.
    """
    config = LoraConfig(r=16, lora_alpha=16) if config is None else config
    check_lora_config(config)
    r = config.r
    check_rank([b.group for b in bases], r)
    if init not in INITIALIZATIONS:
        raise ConfigError(f"init is {init!r}, but must be one of {', '.join(INITIALIZATIONS)}")
    # All checks run before the model is modified.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    conv1d = _check_layers(base, bases)
    check_modules(base, config, [name for b in bases for name in b.group.layers], conv1d)
    frozen = _frozen_parts(base, bases, r, INITIALIZATIONS[init], protect, seed)
    trained = r if init in NONZERO else None
    own = _config_of(config, frozen, trained, conv1d)
    if isinstance(model, PeftModel):
        peft_model = model
        model.add_adapter(adapter_name, own)
    else:
        peft_model = get_peft_model(model, own, adapter_name=adapter_name)  # type: ignore[arg-type,assignment]
    named = own.base_model_name_or_path or config.base_model_name_or_path
    own.base_model_name_or_path = resolvable(named)
    for name, (initial, spaces) in frozen.items():
        layer = base.get_submodule(name)
        _initialize(layer, adapter_name, initial, spaces, trained)
        with gathered(base, name):
            _check_unchanged(layer, adapter_name, name)
        if trained or spaces:
            check_first_steps(layer, adapter_name, name)
    if trained:
        logger.info(
            "init %r has B0 A0 /= 0, which a frozen half subtracts: in PEFT the adapter has r = %d and "
            "lora_alpha = %g, of which the first %d rows of A and columns of B are trained",
            init, own.r, own.lora_alpha, r,
        )  # fmt: skip
    return peft_model


def outline(model: nn.Module, names: Iterable[str], r: int, init: str) -> PeftModel:
    """Wrap layers of a meta-device model as `attach` does, for memory estimates."""
    names, trained = list(names), r if init in NONZERO else None
    conv1d = all(isinstance(model.get_submodule(name), Conv1D) for name in names)
    config = LoraConfig(r=r, lora_alpha=r, task_type="CAUSAL_LM")
    config = _config_of(config, names, trained, conv1d)
    found: PeftModel = get_peft_model(model, config)  # type: ignore[arg-type,assignment]
    for name in names:
        _set_variant(model.get_submodule(name), "default", trained)
    return found


def lora_factors(model: PeftModel, adapter_name: str = "default") -> Factors:
    """A, B and kappa of every adapted layer; the layer's update is exactly kappa B A.

    With an initialization in `initialization.NONZERO` they are [A; A0] (2r, d_in) and [B, -B0] (d_out, 2r),
    otherwise (r, d_in) and (d_out, r). Detached views in the adapter's dtype.
    """
    base = model.get_base_model()
    return {
        name: layer_factors(module, adapter_name)
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def saved_modules(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """Weights and buffers of the modules in ``modules_to_save``, by their names in the base model.

    Detached, in the modules' dtype. Modules sharded by FSDP2 are gathered, so all processes must call it.
    """
    return {
        f"{name}.{leaf}": full_tensor(tensor.detach())
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for leaf, tensor in module.modules_to_save[adapter_name].state_dict().items()
    }


@torch.no_grad()
def restore_forward(model: PeftModel, adapter_name: str = "default") -> None:
    """Set the forward pass of `attach` on those layers of a loaded adapter that have none.

    An adapter folder does not record that half of the adapter is frozen. It is detected from the weights of
    the first layer, since `attach` treats all layers alike: the frozen half subtracts a part of the base
    layer's weight (`subtracts_weight`).
    """
    base = model.get_base_model()
    found: dict[str, Any] = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer)
        and adapter_name in module.lora_A
        and adapter_name not in module.lora_variant
    }
    if not found:
        return
    name, first = next(iter(found.items()))
    a, b, _ = layer_factors(first, adapter_name)
    half = len(a) // 2
    with gathered(base, name):
        image = image_of(base_layer(first))
        frozen = len(a) % 2 == 0 and subtracts_weight(a[half:], b[:, half:], image)
    for layer in found.values():
        _set_variant(layer, adapter_name, half if frozen else None)


def base_layer(module: Any) -> Any:
    """The base layer of an adapted layer; any other module unchanged."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _check_layers(model: nn.Module, bases: Sequence[GroupBasis]) -> bool:
    """Check that the model has the spectrum's layers; returns whether all are Conv1D. Raises ConfigError."""
    modules = dict(model.named_modules())
    layers = {name: base_layer(modules.get(name)) for b in bases for name in b.group.layers}
    for group in (b.group for b in bases):
        for name in group.layers:
            dims = linear_dims(layers[name])
            if dims is None or dims[0] != group.d_in:
                found = "no linear layer" if dims is None else f"one with d_in = {dims[0]}"
                raise ConfigError(
                    f"the spectrum has a layer {name} with d_in = {group.d_in}, but "
                    f"{type(model).__name__} has {found} of that name; use the spectrum of this model"
                )
    return all(isinstance(layer, Conv1D) for layer in layers.values())


def _config_of(
    config: LoraConfig, names: Iterable[str], trained: int | None, conv1d: bool
) -> LoraConfig:
    """PEFT's config of the adapter; a frozen half doubles the rank and scales alpha so that kappa is kept."""
    halves = 1 if trained is None else 2
    alpha = config.lora_alpha * (math.sqrt(halves) if config.use_rslora else halves)
    return lora_config(config, names, halves * config.r, alpha, fan_in_fan_out=conv1d)


@torch.no_grad()
def _frozen_parts(
    model: Any,
    bases: Sequence[GroupBasis],
    r: int,
    initialize: Callable[[Site], Initialization],
    protect: int,
    seed: int,
) -> dict[str, tuple[Initialization, ProtectedSpaces | None]]:
    """Initialization and protected spaces of every adapted layer, by layer name."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, tuple[Initialization, ProtectedSpaces | None]] = {}
    for b in bases:
        for name in b.group.layers:
            with gathered(model, name):
                site = Site(b, image_of(base_layer(model.get_submodule(name))), r, generator)
                try:
                    spaces = leading_singular_spaces(site.weight(), protect) if protect else None
                    parts[name] = initialize(site), spaces and ProtectedSpaces(*spaces)
                except NumericsError as error:
                    raise NumericsError(f"{name}: {error}") from error
    return parts


@torch.no_grad()
def _initialize(
    layer: Any,
    adapter: str,
    initial: Initialization,
    spaces: ProtectedSpaces | None,
    trained: int | None,
) -> None:
    """Set A and B of one layer, its frozen half and its protected spaces."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    a0, image = initial
    a0 = a0.to(a)
    b0 = b.new_zeros(len(b), len(a0)) if image is None else image.to(b) / layer.scaling[adapter]
    if spaces is not None:
        protect_layer(layer, adapter, spaces.to(a.device, a.dtype))
        a0, b0 = spaces.projected(a0, b0)
    a.copy_(a0 if trained is None else torch.cat([a0, a0]))
    b.copy_(b0 if trained is None else torch.cat([b0, -b0], dim=1))
    _set_variant(layer, adapter, trained, spaces is not None)


@torch.no_grad()
def _check_unchanged(layer: Any, adapter: str, name: str) -> None:
    """Check a layer's output and gradients: some quantized layers ignore PEFT's LoRA variants.

    Raises NumericsError.
    """
    base = base_layer(layer)
    weight, variant = layer.lora_B[adapter].weight, layer.lora_variant.get(adapter)
    generator = torch.Generator().manual_seed(0)
    d_in = layer.lora_A[adapter].weight.shape[1]
    dtype = base.weight.dtype if base.weight.is_floating_point() else torch.float32
    x = torch.randn(1, 2, d_in, generator=generator).to(weight.device, dtype)
    active = layer.active_adapters
    with keeping_requires_grad(layer), evaluating(layer):  # dropout would use the random generator
        layer.set_adapter([adapter])
        kept = torch.equal(layer(x), base(x))
        if variant is not None:
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(layer(x).float().square().sum(), weight)
            kept = kept and variant.allows(grad, protected_spaces(layer, adapter))
        layer.set_adapter(active)
    if not kept:
        raise NumericsError(
            f"{name} ({type(layer).__name__}) changes the base layer's output before the first step, or "
            "trains what is frozen or protected, because this layer type ignores PEFT's LoRA variants. "
            "Use a method with init 'eigen' without a constraint, such as folora."
        )


def _set_variant(layer: Any, adapter: str, trained: int | None, constrained: bool = False) -> None:
    """Set `FoLoraVariant` on a layer, if its type calls variants or the update depends on it."""
    names = ("Linear", "Linear8bitLt", "Linear4bit")  # PEFT has the last two with bitsandbytes
    kinds = tuple(getattr(lora, name) for name in names if hasattr(lora, name))
    if trained is not None or constrained or isinstance(layer, kinds):
        layer.lora_variant[adapter] = FoLoraVariant(trained)
