"""Write a trained adapter as an ordinary PEFT folder, or merged into the base model's weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from folora.adapters.adapter import Factors, base_layer, lora_factors, saved_modules
from folora.adapters.lora_config import lora_config
from folora.adapters.variants import product
from folora.errors import ConfigError, NumericsError
from folora.runtime.compat import base_state
from folora.runtime.ownership import check_owned_folder, write_owned_folder
from folora.runtime.shapes import Float

logger = logging.getLogger(__name__)

ADAPTER, MERGED = "adapter", "merged"
"""Kinds of export folders in their lists of files; see `ownership`."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's ``--max-lora-rank`` (except 1, which no adapter needs)."""


@dataclass(frozen=True)
class ExportReport:
    """The rank of an export, and the relative Frobenius error of truncating to it."""

    rank: int
    relative_error: float = 0.0
    worst_layer: str = ""
    worst_relative_error: float = 0.0


def export_adapter(
    model: PeftModel, path: str | Path, *, rank: int | None = None, adapter_name: str = "default"
) -> ExportReport:
    """Write an ordinary PEFT LoRA adapter for the unchanged base model.

    ``task_type``, ``revision`` and ``modules_to_save`` are taken from the adapter; the trained modules are
    included. kappa is written as lora_alpha / r, also for rsLoRA: not every program reads ``use_rslora``.

    Args:
        model: From `attach`, trained or not.
        path: Output folder, new or of an earlier export; files that folora did not write are kept.
        rank: None for the exact adapter (rank 2r with an initialization in `initialization.NONZERO`,
            else r); otherwise each layer's update is truncated to its best approximation of that rank,
            and the error is reported.
        adapter_name: Name of the adapter.

    Raises:
        ConfigError: `rank` is outside [1, rank of the exact adapter], or a file to be written exists
            that folora did not write or that was changed since.
        NumericsError: A factor is not finite.
        ArtifactError: The folder cannot be written.
    """
    config: Any = model.peft_config[adapter_name]
    if config.task_type is None and config.auto_mapping is None:
        base = type(model.get_base_model())
        mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        config = replace(config, auto_mapping=mapping)  # as PEFT saves it, for AutoPeftModel
    factors, modules = lora_factors(model, adapter_name), saved_modules(model, adapter_name)
    return write_adapter(factors, path, config, modules=modules, rank=rank)


def write_adapter(
    factors: Factors,
    path: str | Path,
    config: LoraConfig,
    *,
    modules: Mapping[str, Tensor] | None = None,
    rank: int | None = None,
) -> ExportReport:
    """Write factors and `saved_modules` as a PEFT adapter folder; see `export_adapter`.

    `config` gives all but rank, scaling and layers.
    """
    check_owned_folder(Path(path), ADAPTER)
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
    for name, tensor in (modules or {}).items():
        if not torch.isfinite(tensor).all():
            raise NumericsError(f"{name} holds NaN or Inf; it is not exported")
        tensors[f"base_model.model.{name}"] = tensor.cpu().contiguous()
    config = lora_config(
        config, factors, target, kappa * target, use_rslora=False, inference_mode=True
    )
    needed = next((allowed for allowed in VLLM_RANKS if target <= allowed), None)
    logger.info(
        "the adapter has rank %d: %s", target,
        f"vLLM serves it with --max-lora-rank {needed}" if needed else "too large for vLLM",
    )  # fmt: skip

    def write(target: Path) -> None:
        target.mkdir()
        config.save_pretrained(str(target))
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})

    write_owned_folder(Path(path), ADAPTER, write)
    return _report(target, errors)


def export_merged(model: PeftModel, path: str | Path, adapter_name: str = "default") -> None:
    """Write the base model with the update added to its weights, in the base's dtype.

    Modules in ``modules_to_save`` are written as trained, in the base's dtype. The model in memory is
    not modified.

    Raises:
        ConfigError: The base is quantized, so it cannot be merged without loss; a trained module shares
            a weight with one that is not trained; or the folder may not be overwritten, see
            `export_adapter`.
        ArtifactError: The folder cannot be written.
    """
    state, modules = base_state(model), saved_modules(model, adapter_name)
    _refuse_tied(state, modules)
    state |= {name: tensor.to(state[name].dtype) for name, tensor in modules.items()}
    write_merged(model.get_base_model(), state, lora_factors(model, adapter_name), path)


def write_merged(
    base: Any,
    state: dict[str, Tensor],
    factors: Factors,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a base model's `state` plus factors as a model folder; see `export_merged`."""
    if getattr(base, "is_quantized", False):
        raise ConfigError(
            "a quantized base cannot be merged without loss. Export the adapter and merge it into the "
            "base loaded in bf16: PeftModel.from_pretrained(base, folder).merge_and_unload()"
        )
    if not hasattr(base, "save_pretrained"):
        raise ConfigError(
            f"{type(base).__name__} has no save_pretrained. Use model.merge_and_unload() and save its "
            "state_dict."
        )
    check_owned_folder(Path(path), MERGED)
    merged = dict(state)
    for name, (a, b, scaling) in factors.items():
        weight = state[f"{name}.weight"]
        delta = product(a, b, scaling).to(weight.device)
        if isinstance(base_layer(base.get_submodule(name)), Conv1D):
            delta = delta.T
        merged[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)

    def write(target: Path) -> None:
        base.save_pretrained(target, state_dict=merged)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)

    write_owned_folder(Path(path), MERGED, write)


def truncate(
    a: Float[Tensor, "k d_in"], b: Float[Tensor, "d_out k"], rank: int
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"], float, float]:
    """Best rank-r approximation of B A, its squared error and the squared norm of B A.

    Each factor gets the square root of the singular values. No (d_out, d_in) matrix is formed.
    """
    qa, ra = torch.linalg.qr(a.double().T)
    qb, rb = torch.linalg.qr(b.double())
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    root = s[:rank].sqrt()
    cut_a = (root[:, None] * vh[:rank]) @ qa.T
    cut_b = (qb @ u[:, :rank]) * root
    lost = float((s[rank:] ** 2).sum())
    return cut_a.to(a.dtype), cut_b.to(b.dtype), lost, float((s**2).sum())


def _refuse_tied(state: Mapping[str, Tensor], modules: Mapping[str, Tensor]) -> None:
    """Refuse trained modules with a weight that is tied to an untrained one. Raises ConfigError."""
    names = {state[name].data_ptr(): name for name in modules if state[name].numel()}
    for name, tensor in state.items():
        trained = names.get(tensor.data_ptr())
        if trained and name not in modules:
            raise ConfigError(
                f"{trained} is trained by modules_to_save, but the base model ties it to {name}, so that "
                "a merged model cannot hold both. Export the adapter instead."
            )


def _report(rank: int, errors: dict[str, tuple[float, float]]) -> ExportReport:
    if not errors:
        return ExportReport(rank)
    relative = {n: (lost / whole) ** 0.5 if whole else 0.0 for n, (lost, whole) in errors.items()}
    worst = max(relative, key=lambda n: relative[n])
    lost, whole = (sum(e[i] for e in errors.values()) for i in (0, 1))
    total = (lost / whole) ** 0.5 if whole else 0.0
    return ExportReport(rank, total, worst, relative[worst])
