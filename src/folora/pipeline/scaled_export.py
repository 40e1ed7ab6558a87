"""Scale the LoRA adapter in a folder, ours or not, so that its KL to the base is within a budget."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from folora.adapters.export import ADAPTER
from folora.calibration.base_file import (
    check_base_sources,
    read_base_file,
    read_base_manifest,
)
from folora.config import FoLoraConfig
from folora.errors import ArtifactError, ConfigError
from folora.metrics.budget import ENOUGH, BudgetFit, More, fit_budget
from folora.metrics.meter import Texts
from folora.pipeline.context import Context
from folora.pipeline.further_text import further_text, generated
from folora.runtime.loading import required
from folora.runtime.ownership import check_owned_folder, write_owned_folder

SCALED = (".lora_B.", ".lora_embedding_B")
"""In the names of the weights that are multiplied by the scale."""
REFUSED = {
    "use_dora": "DoRA's update is not linear in its scale",
    "bias": "trained biases are not scaled",
    "modules_to_save": "whole trained modules are not scaled",
    "trainable_token_indices": "trained tokens are not scaled",
    "alora_invocation_tokens": "an activated LoRA is off on text without its invocation tokens",
}
"""Fields of a LoraConfig that must be unset, with the reason."""
RESIDUAL = ("pissa", "olora", "loftq", "corda")
"""Initializations that change the base's weights."""


def export_scaled(config: FoLoraConfig, adapter: Path, target: Path) -> BudgetFit:
    """Write an adapter, scaled so that its KL to the base is within ``config.budget``.

    KL is measured on text that the base generates now, or on the held-out text of ``config.base``, and on further
    text where that does not show the budget kept. The factors B are multiplied by the scale, in their dtype; all
    else is copied.

    Args:
        config: ``model`` (default: the adapter's base), ``budget``, and options of loading and sampling.
        adapter: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        target: Folder to write, new or of an earlier export.

    Raises:
        ConfigError: There is no budget, the adapter is no LoRA adapter or has parts that are not scaled, or
            `target` may not be overwritten.
        ArtifactError: The adapter's files cannot be read.
    """
    if config.budget is None:
        raise ConfigError(
            "--budget is required: the KL in nats per token that --adapter is scaled to"
        )
    if target.resolve() == adapter.resolve():
        raise ConfigError(f"{target} is the adapter itself; give another folder by --to")
    check_owned_folder(target, ADAPTER)
    base = check_adapter_folder(adapter)
    context = Context(config if config.model else config.replace(model=required(base, "model")))
    if config.base is not None:
        check_base_sources(read_base_manifest(Path(config.base)), config.sampling)
    else:
        _ = context.mixture  # a source that cannot be used is found before the model is loaded
    fit = fit_adapter(context, adapter, *_held_out(context))
    tensors = {
        name: (tensor.float() * fit.scale).to(tensor.dtype)
        if any(part in name for part in SCALED)
        else tensor
        for name, tensor in _read(adapter).items()
    }

    def write(folder: Path) -> None:
        folder.mkdir()
        shutil.copyfile(adapter / CONFIG_NAME, folder / CONFIG_NAME)
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    write_owned_folder(target, ADAPTER, write)
    return fit


def fit_adapter(
    context: Context, adapter: Path, held_out: Texts, more: More | None = None
) -> BudgetFit:
    """The scale at which the adapter in a folder is within the config's budget on held-out text, and `more`."""
    config = context.config
    assert config.budget is not None
    model = PeftModel.from_pretrained(context.model, str(adapter))
    return fit_budget(model, held_out, config.budget, config.statistics.batch_size, more)


def check_adapter_folder(adapter: Path) -> str | None:
    """Refuse what cannot be scaled; returns the name of the adapter's base model. Raises ConfigError."""
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (adapter / name).is_file():
            other = adapter / "adapter_model.bin"
            remedy = f"; save {other.name} as safetensors by PEFT first" if other.exists() else ""
            raise ConfigError(f"{adapter} has no {name}{remedy}")
    try:
        found: Any = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError, OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{adapter / CONFIG_NAME} cannot be read: {error}") from error
    kind = getattr(found.peft_type, "value", found.peft_type)
    if kind != "LORA":
        raise ConfigError(f"{adapter} is a {kind} adapter, but only LoRA adapters can be scaled")
    for name, reason in REFUSED.items():
        if (value := getattr(found, name, None)) not in (None, False, "none", [], {}):
            raise ConfigError(f"{adapter} has {name} = {value!r}: {reason}")
    start = found.init_lora_weights
    if isinstance(start, str) and start.startswith(RESIDUAL):
        raise ConfigError(
            f"{adapter} has init_lora_weights = {start!r}, which changes the base's weights; convert it to LoRA "
            "first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return found.base_model_name_or_path or None


def _read(adapter: Path) -> dict[str, Tensor]:
    try:
        return load_file(adapter / SAFETENSORS_WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{adapter / SAFETENSORS_WEIGHTS_NAME} cannot be read: {error}"
        ) from error


def _held_out(context: Context) -> tuple[Texts, More | None]:
    """Text that the adapter was not trained on, of the base file or generated now, and what generates more of it."""
    config = context.config
    if config.base is not None:
        samples = read_base_file(Path(config.base), context.facts).samples
        return samples.by_source(), further_text(context, samples)
    return generated(context, max(ENOUGH, config.sampling.num_held_out)), None
