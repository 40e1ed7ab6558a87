"""A PEFT model out, an ordinary LoRA adapter back.

No initialization changes the model before the first step, and the base is never changed. The adapter is an
ordinary LoRA adapter at any time, so that saving, loading, copying, combining, disabling, merging and quantized
bases are PEFT's; one that starts at B0 A0 /= 0 has rank 2r, [B, -B0] [A; A0] (`variants`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners import lora
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from folora.adapters.constraint import ProtectedSpaces, protect_layer, spaces_of
from folora.adapters.initialization import NONZERO, STARTS, Site, Start, leading_singular_spaces
from folora.adapters.lora_config import lora_config, max_lora_rank, resolvable
from folora.adapters.variants import FoLoraVariant, check_first_steps, layer_factors, product
from folora.errors import ConfigError, NumericsError
from folora.runtime.compat import base_state
from folora.runtime.contexts import gathered
from folora.runtime.ownership import check_own_folder, write_own_folder
from folora.runtime.shapes import Float
from folora.runtime.tensors import full_fp32_matmul
from folora.spectral.layers import GroupBasis, check_rank

logger = logging.getLogger(__name__)

ADAPTER, MERGED = "adapter", "merged"
"""What the list of an exported folder says of it; see `ownership`."""

Spaces = tuple[Tensor, Tensor]
"""U (d_out, k) and V (d_in, k), what OPLoRA protects."""

Factors = dict[str, tuple[Tensor, Tensor, float]]
"""A (k, d_in), B (d_out, k) and kappa by layer name; the layer's update is kappa B A."""


def attach(
    model: PreTrainedModel | PeftModel,
    bases: Sequence[GroupBasis],
    *,
    r: int = 16,
    alpha: float | int | None = None,
    init: str = "eigen",
    protect: int = 0,
    seed: int = 0,
    adapter_name: str = "default",
) -> PeftModel:
    """Put a LoRA adapter on the layers of `bases` and initialize it.

    The model computes exactly what it computed before, until the first step. With an initialization
    in `initialization.NONZERO` the adapter has rank 2r in PEFT, and ``peft_config`` says 2r and 2 alpha:
    [A; A0] and [B, -B0], of which A0 and B0 are frozen.

    Args:
        model: The base model, or a PEFT model that gets one more adapter. Layers are wrapped in
            place, as by ``peft.get_peft_model``.
        bases: From `solve`.
        r: Rank.
        alpha: PEFT's lora_alpha; kappa = alpha / r. Default r.
        init: One of `initialization.STARTS`: ``"eigen"`` (A0 spans the leading eigenvectors,
            B0 = 0), ``"null_space"`` (the paper's; needs `null_basis` of at least r columns),
            ``"kaiming"`` (LoRA's own), and those of other methods.
        protect: OPLoRA's k: how many leading singular directions of each weight the update leaves
            alone, on both sides. 0 for none.
        seed: For ``"kaiming"``.
        adapter_name: Name in PEFT.

    Raises:
        ConfigError: r is larger than a layer's d_in, `init` is unknown, or the bases lack the null
            space.
        NumericsError: A layer kind ignores the start, so that its output would change.
    """
    check_rank([b.group for b in bases], r)
    if init not in STARTS:
        raise ConfigError(f"init is {init!r}, but must be one of {', '.join(STARTS)}")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # Everything that can fail comes before anything is touched.
    frozen = _frozen_parts(base, bases, r, STARTS[init], protect, seed)
    names = list(frozen)
    trained = r if init in NONZERO else None
    config = _lora_config(base, names, r, r if alpha is None else alpha, trained)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        peft_model = model
    else:
        peft_model = get_peft_model(model, config, adapter_name=adapter_name)  # type: ignore[assignment]
    config.base_model_name_or_path = resolvable(config.base_model_name_or_path)
    for name, (start, protected) in frozen.items():
        layer = _lora_layer(peft_model, name)
        _initialize(layer, adapter_name, start, protected, trained)
        with gathered(base, name):
            _check_unchanged(layer, adapter_name, name)
        if trained or protected:
            check_first_steps(layer, adapter_name, name)
    if trained:
        logger.info(
            "init %r starts at B0 A0 /= 0, which is taken off by a frozen half: in PEFT the adapter has r = %d and "
            "lora_alpha = %g, of which the first %d rows of A and columns of B are trained",
            init, config.r, config.lora_alpha, r,
        )  # fmt: skip
    return peft_model


def outline(model: PreTrainedModel, names: Iterable[str], r: int, init: str) -> PeftModel:
    """An adapter of the build that `attach` gives, for a model without weights: to count with.

    Args:
        model: On the meta device; its layers are wrapped in place.
        names: Of the layers to adapt.
        r: Rank.
        init: As for `attach`.
    """
    names, trained = list(names), r if init in NONZERO else None
    config = _lora_config(model, names, r, r, trained)
    found: PeftModel = get_peft_model(model, config)  # type: ignore[assignment]
    for name in names:
        _take_variant(_lora_layer(found, name), "default", trained)
    return found


def lora_factors(model: PeftModel, adapter_name: str = "default") -> Factors:
    """A, B and kappa of every adapted layer, such that its update is exactly kappa B A.

    After an initialization in `initialization.NONZERO` they are [A; A0] (2r, d_in) and [B, -B0] (d_out, 2r),
    else (r, d_in) and (d_out, r). Detached views in the adapter's dtype.
    """
    base = model.get_base_model()
    return {
        name: layer_factors(module, adapter_name)
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote: rank, and the relative Frobenius error of cutting back to it."""

    rank: int
    relative_error: float
    worst_layer: str
    worst_relative_error: float


def export_adapter(
    model: PeftModel, path: str | Path, *, rank: int | None = None, adapter_name: str = "default"
) -> ExportReport:
    """Write an ordinary PEFT LoRA adapter for the untouched base model.

    Args:
        model: From `attach`, trained or not.
        path: Folder to make, or one of an earlier export; files of others in it are kept.
        rank: None for the exact adapter (rank 2r after an initialization in `initialization.NONZERO`,
            else r); otherwise each layer's update is cut back to its best approximation of that rank,
            and the error is reported.
        adapter_name: Which adapter.

    Raises:
        ConfigError: `rank` is outside of [1, rank of the exact adapter], or the folder holds
            what folora did not write, or what was changed since.
        NumericsError: A factor is not finite.
        ArtifactError: The folder cannot be written.
    """
    config = model.peft_config[adapter_name]
    return write_adapter(
        lora_factors(model, adapter_name),
        path,
        base_model=config.base_model_name_or_path,
        fan_in_fan_out=config.fan_in_fan_out,  # type: ignore[attr-defined]
        rank=rank,
    )


def write_adapter(
    factors: Factors,
    path: str | Path,
    *,
    base_model: str | None,
    fan_in_fan_out: bool = False,
    rank: int | None = None,
) -> ExportReport:
    """Write factors as a PEFT adapter folder; see `export_adapter`."""
    check_own_folder(Path(path), ADAPTER, "the export folder")
    exact = max(len(a) for a, _, _ in factors.values())
    if rank is not None and not 1 <= rank <= exact:
        raise ConfigError(f"export rank is {rank}, but must lie in [1, {exact}]")
    target = exact if rank is None else rank
    kappa = next((scaling for *_, scaling in factors.values() if scaling), 0.0)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, tuple[float, float]] = {}
    for name, (a, b, scaling) in factors.items():
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise NumericsError(f"the adapter of {name} holds NaN or Inf; it is not exported")
        if target < len(a):
            a, b, lost, whole = truncate(a, b, target)
            errors[name] = (scaling**2 * lost, scaling**2 * whole)
        # One rank and one kappa for all layers: not every program reads PEFT's patterns.
        missing = target - len(a)
        b = b if scaling == kappa else b * (scaling / kappa)
        a, b = pad(a.cpu(), (0, 0, 0, missing)), pad(b.cpu(), (0, missing))
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    config = lora_config(
        factors,
        target,
        kappa * target,
        fan_in_fan_out=fan_in_fan_out,
        base_model=base_model,
        inference_mode=True,
    )
    needed = max_lora_rank(target)
    logger.info(
        "the adapter has rank %d: %s", target,
        f"vLLM serves it with --max-lora-rank {needed}" if needed else "too large for vLLM",
    )  # fmt: skip

    def write(target: Path) -> None:
        target.mkdir()
        config.save_pretrained(str(target))
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})

    write_own_folder(Path(path), ADAPTER, write)
    return _report(target, errors)


def export_merged(model: PeftModel, path: str | Path, adapter_name: str = "default") -> None:
    """Write the base model with the update added to its weights, in the base's dtype.

    The model in memory is not changed.

    Raises:
        ConfigError: The base is quantized; its weights cannot take the update exactly. Or the folder
            is none that folora may write; see `export_adapter`.
        ArtifactError: The folder cannot be written.
    """
    _refuse_quantized(model.get_base_model())
    state = base_state(model)
    write_merged(model.get_base_model(), state, lora_factors(model, adapter_name), path)


def write_merged(
    base: Any,
    state: dict[str, Tensor],
    factors: Factors,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a base model's `state` plus factors as a model folder; see `export_merged`."""
    _refuse_quantized(base)
    check_own_folder(Path(path), MERGED, "the export folder")
    merged = dict(state)
    for name, (a, b, scaling) in factors.items():
        weight = state[f"{name}.weight"]
        delta = product(a, b, scaling).to(weight.device)
        if isinstance(_base_layer(base.get_submodule(name)), Conv1D):
            delta = delta.T
        merged[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)

    def write(target: Path) -> None:
        base.save_pretrained(target, state_dict=merged)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)

    write_own_folder(Path(path), MERGED, write)


def truncate(
    a: Float[Tensor, "k d_in"], b: Float[Tensor, "d_out k"], rank: int
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"], float, float]:
    """Best rank-r approximation of B A, its squared error and the squared norm of B A.

    Both factors get half of the singular values' logarithm. No (d_out, d_in) matrix is formed.
    """
    qa, ra = torch.linalg.qr(a.double().T)
    qb, rb = torch.linalg.qr(b.double())
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    root = s[:rank].sqrt()
    cut_a = (root[:, None] * vh[:rank]) @ qa.T
    cut_b = (qb @ u[:, :rank]) * root
    lost = float((s[rank:] ** 2).sum())
    return cut_a.to(a.dtype), cut_b.to(b.dtype), lost, float((s**2).sum())


def _lora_config(
    base: Any, names: list[str], r: int, alpha: float | int, trained: int | None
) -> LoraConfig:
    """PEFT's config; with a frozen half rank and alpha are doubled, so that kappa stays."""
    halves = 1 if trained is None else 2
    conv1d = all(isinstance(_base_layer(base.get_submodule(n)), Conv1D) for n in names)
    return lora_config(names, halves * r, halves * alpha, fan_in_fan_out=conv1d)


@torch.no_grad()
def _frozen_parts(
    model: Any,
    bases: Sequence[GroupBasis],
    r: int,
    start: Callable[[Site], Start],
    protect: int,
    seed: int,
) -> dict[str, tuple[Start, Spaces | None]]:
    """Initialization and protected spaces of every adapted layer, by its name."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, tuple[Start, Spaces | None]] = {}
    for b in bases:
        for name in b.group.layers:
            with gathered(model, name):
                site = Site(b, _image_of(_base_layer(model.get_submodule(name))), r, generator)
                try:
                    spaces = leading_singular_spaces(site.weight(), protect) if protect else None
                    parts[name] = (start(site), spaces)
                except NumericsError as error:
                    raise NumericsError(f"{name}: {error}") from error
    return parts


def _image_of(base: Any) -> Callable[[Tensor], Tensor]:
    """x -> W0 x for rows of x, whatever the layer's kind and dtype."""
    weight, bias = base.weight, getattr(base, "bias", None)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32

    def image(x: Tensor) -> Tensor:
        with full_fp32_matmul():
            out = base(x.to(weight.device, dtype))
        return out if bias is None else out - bias

    return image


@torch.no_grad()
def _initialize(
    layer: Any, adapter: str, start: Start, protected: Spaces | None, trained: int | None
) -> None:
    """Set A and B of one layer, its frozen half and its protected spaces."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    a0, image = start
    a0 = a0.to(a)
    b0 = b.new_zeros(len(b), len(a0)) if image is None else image.to(b) / layer.scaling[adapter]
    if protected is not None:
        spaces = ProtectedSpaces(*(space.to(a) for space in protected))
        protect_layer(layer, adapter, spaces)
        a0, b0 = spaces.projected(a0, b0)
    a.copy_(a0 if trained is None else torch.cat([a0, a0]))
    b.copy_(b0 if trained is None else torch.cat([b0, -b0], dim=1))
    _take_variant(layer, adapter, trained, protected is not None)


@torch.no_grad()
def _check_unchanged(layer: Any, adapter: str, name: str) -> None:
    """Some quantized layers ignore PEFT's variants; then the promise would be broken silently."""
    base = _base_layer(layer)
    weight, variant = layer.lora_B[adapter].weight, layer.lora_variant.get(adapter)
    generator = torch.Generator().manual_seed(0)
    d_in = layer.lora_A[adapter].weight.shape[1]
    dtype = base.weight.dtype if base.weight.is_floating_point() else torch.float32
    x = torch.randn(1, 2, d_in, generator=generator).to(weight.device, dtype)
    active = layer.active_adapters
    layer.set_adapter([adapter])
    try:
        kept = torch.equal(layer(x), base(x))
        if variant is not None:
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(layer(x).float().square().sum(), weight)
            kept = kept and variant.takes(grad, spaces_of(layer, adapter))
    finally:
        layer.set_adapter(active)
    if not kept:
        raise NumericsError(
            f"{name} ({type(layer).__name__}) does not give the base layer's output before the "
            "first step, or trains what is frozen or protected, because this kind of layer ignores "
            "PEFT's LoRA variants. Use adapter.init = 'eigen' and no constraint; they need none."
        )


def _take_variant(layer: Any, adapter: str, trained: int | None, constrained: bool = False) -> None:
    """Give a layer `FoLoraVariant`, if it takes variants or the update is none without."""
    if trained is not None or constrained or _takes_variants(layer):
        layer.lora_variant[adapter] = FoLoraVariant(trained)


def _takes_variants(layer: Any) -> bool:
    """Whether PEFT's kind of layer leaves what becomes of its input to a variant; some do not."""
    kinds: tuple[type, ...] = (Linear,)
    # PEFT imports these on first access, and bitsandbytes with them.
    if is_bnb_available():
        kinds += (lora.Linear8bitLt,)
    if is_bnb_4bit_available():
        kinds += (lora.Linear4bit,)
    return isinstance(layer, kinds)


def _refuse_quantized(base: Any) -> None:
    if getattr(base, "is_quantized", False):
        raise ConfigError(
            "a quantized base cannot be merged without loss. Export the adapter, and merge it into "
            "the base loaded in bf16: PeftModel.from_pretrained(base, folder).merge_and_unload()"
        )


def _base_layer(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _lora_layer(model: PeftModel, name: str) -> Any:
    return model.get_base_model().get_submodule(name)


def _report(rank: int, errors: dict[str, tuple[float, float]]) -> ExportReport:
    if not errors:
        return ExportReport(rank, 0.0, "", 0.0)
    relative = {n: (lost / whole) ** 0.5 if whole else 0.0 for n, (lost, whole) in errors.items()}
    worst = max(relative, key=lambda n: relative[n])
    lost, whole = (sum(e[i] for e in errors.values()) for i in (0, 1))
    total = (lost / whole) ** 0.5 if whole else 0.0
    return ExportReport(rank, total, worst, relative[worst])
