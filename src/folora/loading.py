"""Models and tokenizers by name, with what can go wrong said in plain words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from folora.config import FoLoraConfig
from folora.errors import ConfigError


def required(value: str | None, option: str) -> str:
    """A top-level option that this command cannot do without. Raises ConfigError."""
    if not value:
        raise ConfigError(f"--{option} is needed here")
    return value


def check_model_name(name: str) -> None:
    """Refuse, before anything is loaded, a folder that holds no model. Raises ConfigError."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"the folder {name} holds no model: config.json is missing")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"the model folder {name} does not exist")


def device_of(config: FoLoraConfig) -> torch.device:
    """The device that ``--device`` stands for. Raises ConfigError if it is not there."""
    if config.device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device is {config.device!r}: {reason}") from error
    return device


def load_config(config: FoLoraConfig, name: str) -> Any:
    """The model's transformers config. Raises ConfigError."""
    check_model_name(name)
    return _load(
        AutoConfig.from_pretrained,
        name,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )


def load_tokenizer(config: FoLoraConfig, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right. Raises ConfigError."""
    check_model_name(name)
    tokenizer = _load(
        AutoTokenizer.from_pretrained,
        name,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"the tokenizer of {name} has neither a padding nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere
    return tokenizer


def load_model(config: FoLoraConfig, name: str) -> PreTrainedModel:
    """The causal LM in evaluation mode on its device. Raises ConfigError."""
    check_model_name(name)
    device = device_of(config)
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.quantize != "none":
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=config.quantize == "8bit",
            load_in_4bit=config.quantize == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = _load(AutoModelForCausalLM.from_pretrained, name, **options)
    if config.quantize == "none":
        model = model.to(device)
    return model.eval()


def _load(load: Any, name: str, **options: Any) -> Any:
    """Call a from_pretrained; the Hub's, safetensors' and transformers' errors become ours."""
    try:
        return load(name, **options)
    except Exception as error:  # OSError, ValueError, SafetensorError, ImportError, HTTP errors ...
        where = "" if Path(name).exists() else _offline_hint()
        raise ConfigError(f"model {name!r} cannot be loaded: {error}{where}") from error


def _offline_hint() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return " (HF_HUB_OFFLINE is set, so only the local cache was looked at)"
    return ""
