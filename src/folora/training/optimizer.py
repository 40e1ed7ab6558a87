"""SAdam for an adapter: A is updated in the bases of a spectrum, all other parameters by AdamW.

It needs a PEFT model and a spectrum, made in this process or loaded from files of another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from folora.adapters.adapter import restore_forward
from folora.adapters.constraint import project_after_step
from folora.errors import ConfigError
from folora.optim.fused import FusedSAdam
from folora.optim.sadam import SAdam
from folora.spectral.eigenproblem import spectral_gate, step_scale
from folora.spectral.layers import GroupBasis

BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW's


def optimizer(
    model: PeftModel,
    bases: Iterable[GroupBasis],
    lr: float,
    *,
    lr_b_ratio: float = 1.0,
    weight_decay: float = 0.0,
    lam: float = 1.0,
    s_min: float = 0.3,
    directions: int | Literal["all"] | None = None,
    step_scale: str = "task",
    spectral: bool = True,
    betas: tuple[float, float] = BETAS,
    eps: float = EPSILON,
    fused: bool = True,
    adapter_name: str = "default",
) -> SAdam:
    """Make the optimizer of an adapter, for any training loop or Trainer.

    The model comes from `attach`, or from ``PeftModel.from_pretrained(base, folder, is_trainable=True)`` where
    the folder is a checkpoint or an export. Layers loaded by PEFT get the forward pass of `attach`; a frozen
    initialization in the second half of an adapter (`initialization.NONZERO`) remains frozen. OPLoRA's
    protected spaces are not saved with an adapter: call `attach`, then ``load_adapter``.

    Args:
        model: A PEFT model with a LoRA adapter on exactly the layers of `bases`.
        bases: The spectrum, from `solve` or loaded.
        lr: Learning rate of A and of the modules in ``modules_to_save``.
        lr_b_ratio: Learning rate of B divided by that of A.
        weight_decay: Decoupled weight decay of all parameters.
        lam: The gate's lambda, >= 0.
        s_min: Minimum of the gate, in [0, 1].
        directions: Number of leading eigenvectors along which A is updated, or ``"all"`` for all columns
            of `bases`; default is the adapter's rank.
        step_scale: ``"task"``, or ``"paper"`` for none.
        spectral: False for plain AdamW.
        betas: Decay of the two moments.
        eps: Added to the square root of the second moment.
        fused: Use `FusedSAdam`; False for the reference `SAdam`, equal up to rounding.
        adapter_name: Name of the adapter in PEFT.

    Raises:
        ConfigError: The model has no such adapter, its layers are not those of the spectrum, or it has no
            trainable parameters.
        ValueError: A value is outside its interval.
    """
    bases = list(bases)
    _check_adapter(model, bases, adapter_name)
    restore_forward(model, adapter_name)
    if directions is None:
        directions = _rank(model, bases[0], adapter_name)
    groups = param_groups(
        model, bases, lr=lr, lr_b_ratio=lr_b_ratio, weight_decay=weight_decay, lam=lam, s_min=s_min,
        directions=None if directions == "all" else directions, step_scale=step_scale, spectral=spectral, adapter_name=adapter_name,
    )  # fmt: skip
    kind = FusedSAdam if fused else SAdam
    made = kind(groups, betas=betas, eps=eps)
    project_after_step(made, model, adapter_name)
    return made


def param_groups(
    model: PeftModel,
    bases: Iterable[GroupBasis],
    *,
    lr: float,
    lr_b_ratio: float = 1.0,
    weight_decay: float = 0.0,
    lam: float = 1.0,
    s_min: float = 0.3,
    directions: int | None = None,
    step_scale: str = "task",
    spectral: bool = True,
    adapter_name: str = "default",
) -> list[dict[str, Any]]:
    """Parameter groups of `optimizer`, where the arguments are documented.

    One group for the A of each shared input, then one for ``modules_to_save`` if any, and one for all B.
    """
    base = model.get_base_model()
    groups: list[dict[str, Any]] = []
    b_params = []
    for b in bases:
        layers: list[Any] = [base.get_submodule(name) for name in b.group.layers]
        a_params = [layer.lora_A[adapter_name].weight for layer in layers]
        b_params += [layer.lora_B[adapter_name].weight for layer in layers]
        if not a_params[0].requires_grad:
            continue
        group: dict[str, Any] = {"params": a_params, "lr": lr, "weight_decay": weight_decay}
        if spectral:
            group |= gated_basis(b, lam, s_min, directions, step_scale)
        groups.append(group)
    if saved := _saved_parameters(base, adapter_name):
        groups.append({"params": saved, "lr": lr, "weight_decay": weight_decay})
    groups.append({"params": b_params, "lr": lr * lr_b_ratio, "weight_decay": weight_decay})
    return groups


def gated_basis(
    b: GroupBasis, lam: float, s_min: float, directions: int | None, step_scaling: str
) -> dict[str, Any]:
    """The entries of a group of `SAdam`: leading columns of a basis, their gate and the scale.

    Args:
        b: The solved basis.
        lam: The gate's lambda.
        s_min: Minimum of the gate.
        directions: Number of columns; None for all.
        step_scaling: ``"task"`` or ``"paper"``.
    """
    gamma = b.gamma[:directions]
    gate = spectral_gate(gamma, lam, s_min)
    scale = 1.0 if step_scaling == "paper" else step_scale(gamma, gate, b.task_trace)
    return {"basis": b.basis[:, :directions].contiguous(), "gate": gate, "scale": scale}


def _rank(model: PeftModel, basis: GroupBasis, adapter_name: str) -> int:
    """Number of trained rows of A."""
    layer: Any = model.get_base_model().get_submodule(basis.group.name)
    variant = layer.lora_variant.get(adapter_name)
    return getattr(variant, "trained", None) or len(layer.lora_A[adapter_name].weight)


def _saved_parameters(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """The trainable parameters of the modules in ``modules_to_save``."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for parameter in module.modules_to_save[adapter_name].parameters()
        if parameter.requires_grad
    ]


def _check_adapter(model: PeftModel, bases: Sequence[GroupBasis], adapter_name: str) -> None:
    """Refuse an adapter that does not match the spectrum or is frozen. Raises ConfigError."""
    layers: dict[str, Any] = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }
    if not layers:
        raise ConfigError(
            f"the model has no LoRA adapter {adapter_name!r}, but {', '.join(model.peft_config)}; "
            "attach one, or give its name"
        )
    widths = {name: b.group.d_in for b in bases for name in b.group.layers}
    if other := sorted(layers.keys() ^ widths.keys()):
        has, lacks = ("adapter", "spectrum") if other[0] in layers else ("spectrum", "adapter")
        raise ConfigError(
            f"the {has} has the layer {other[0]}, the {lacks} does not ({len(other)} such layers); "
            "give the spectrum that the adapter was made from"
        )
    for name, layer in layers.items():
        d_in = layer.lora_A[adapter_name].weight.shape[1]
        if d_in != widths[name]:
            raise ConfigError(
                f"{name} has d_in = {d_in}, but {widths[name]} in the spectrum; give the spectrum of this model"
            )
    if not any(layer.lora_B[adapter_name].weight.requires_grad for layer in layers.values()):
        raise ConfigError(
            f"the adapter {adapter_name!r} is frozen. Load it with PeftModel.from_pretrained(..., "
            f"is_trainable=True), or activate it: model.set_adapter({adapter_name!r})"
        )
