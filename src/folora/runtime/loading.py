"""Load models and tokenizers by name; every failure becomes a ConfigError with a remedy."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig

from folora.config import FoLoraConfig
from folora.errors import ConfigError
from folora.runtime import distributed
from folora.runtime.architecture import check_config
from folora.runtime.contexts import is_sharded

logger = logging.getLogger(__name__)

LONGEST_REASON = 300


def required(value: str | None, option: str) -> str:
    """The value of an option that a command requires. Raises ConfigError."""
    if not value:
        raise ConfigError(f"--{option} is required")
    return value


def check_model_name(name: str) -> None:
    """Refuse a path without a model before anything is loaded. Raises ConfigError."""
    if os.path.isdir(name):  # False for a name too long, at which Path raises
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise ConfigError(f"the folder {name} holds no model: config.json is missing")
    elif os.path.isfile(name):
        raise ConfigError(f"the model {name} is a file, but must be a folder or a Hub name")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"the model folder {name} does not exist")


def check_quantizer(config: FoLoraConfig) -> None:
    """Refuse ``--quantize`` without bitsandbytes. Raises ConfigError."""
    if config.quantize != "none" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantize {config.quantize!r} needs bitsandbytes: pip install 'folora[quantized]'"
        )


def device_of(config: FoLoraConfig) -> torch.device:
    """The device of ``--device``. Raises ConfigError if it is not available."""
    if config.device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return torch.device("cpu")
        return (
            torch.device(accelerator.type, distributed.local_rank())
            if distributed.world_size() > 1
            else accelerator
        )
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device is {config.device!r}: {reason}") from error
    if device.type == "meta":
        raise ConfigError("device is 'meta', but must be one that computes")
    return device


def load_config(config: FoLoraConfig, name: str) -> Any:
    """The transformers config of a causal LM. Raises ConfigError."""
    check_model_name(name)
    found = _load(AutoConfig.from_pretrained, config, name)
    check_config(found, name)
    return found


def load_generation_config(config: FoLoraConfig, name: str) -> GenerationConfig | None:
    """The model's generation config; None if it has none."""
    try:
        return GenerationConfig.from_pretrained(name, revision=config.revision or "main")
    except OSError:
        return None


def dtype_for(config: FoLoraConfig, device: torch.device, model_config: Any) -> torch.dtype | None:
    """The dtype to load a model in, on a device; None if its config names none.

    ``--dtype auto`` is the checkpoint's dtype, but float32 on a CPU without matrix products in that dtype:
    with AVX2 only, a product in bf16 takes 28 times as long.
    """
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    stored = getattr(model_config.get_text_config(), "dtype", None)
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    return None if stored is None else fast_dtype(stored, device)


def fast_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """A checkpoint's dtype, or float32 on a CPU without matrix products in it."""
    return torch.float32 if device.type == "cpu" and is_slow_here(stored) else stored


def is_slow_here(dtype: torch.dtype) -> bool:
    """Whether oneDNN has no matrix products in this dtype on this CPU."""
    narrow = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if narrow is None or not torch.backends.mkldnn.is_available():
        return narrow is not None
    return not getattr(torch.ops.mkldnn, f"_is_mkldnn_{narrow}_supported")()


def warn_if_slow(dtype: torch.dtype | None, device: torch.device) -> None:
    """Log a warning if the device is a CPU without matrix products in this dtype."""
    if dtype is not None and fast_dtype(dtype, device) != dtype:
        name = str(dtype).removeprefix("torch.")
        logger.warning(
            "matrix products in %s are many times slower than in float32 on this CPU; use --dtype auto, "
            "or from_pretrained(..., dtype=torch.float32)",
            name,
        )


def load_skeleton(config: FoLoraConfig, model_config: Any) -> PreTrainedModel:
    """The model with uninitialized weights, on torch's default device. Raises ConfigError."""

    def load(name: str, revision: str | None, **options: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(model_config, **options)

    return _load(load, config, required(config.model, "model"))


def load_tokenizer(config: FoLoraConfig, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with right padding. Raises ConfigError."""
    check_model_name(name)
    tokenizer = _load(AutoTokenizer.from_pretrained, config, name, "the tokenizer of model")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"the tokenizer of {name} has neither a padding nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere
    return tokenizer


def load_model(config: FoLoraConfig, name: str, as_stored: bool = False) -> PreTrainedModel:
    """Load a causal LM in evaluation mode, with frozen weights, on its device.

    With `as_stored`, ``--dtype auto`` is the checkpoint's dtype even where it is slow; see `dtype_for`.

    Raises:
        ConfigError: It cannot be loaded, or weights are missing.
    """
    check_quantizer(config)
    device = device_of(config)
    model_config = load_config(config, name)
    dtype = None if as_stored else dtype_for(config, device, model_config)
    warn_if_slow(dtype, device)
    options: dict[str, Any] = {"dtype": dtype or config.dtype}
    if config.quantize != "none":
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=config.quantize == "8bit",
            load_in_4bit=config.quantize == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if config.shard and distributed.world_size() > 1:
        # FSDP2: each process holds a shard; blocks are unsharded while they run.
        options["distributed_config"] = DistributedConfig(fsdp_size=distributed.world_size())
    # With this switch, transformers would load weights on one process only.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # Weights of a wrong shape are refused below; transformers only logs them.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _load(AutoModelForCausalLM.from_pretrained, config, name, **options)
    if info["mismatched_keys"]:
        layer, found, wanted = min(info["mismatched_keys"])
        raise ConfigError(
            f"model {name!r} cannot be loaded: {layer} has shape {tuple(found)} in the checkpoint, "
            f"but {tuple(wanted)} by config.json"
        )
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"the checkpoint of model {name!r} lacks {len(missing)} of the weights, such as "
            f"{missing[0]}; transformers would fill them with random numbers"
        )
    if config.quantize == "none" and not is_sharded(model):
        model = model.to(device)
    # Frozen before the first forward pass, at which FSDP2 fixes which weights are trainable.
    return model.requires_grad_(False).eval()


def _load(load: Any, config: FoLoraConfig, name: str, what: str = "model", **options: Any) -> Any:
    """Call a `from_pretrained`; any error becomes a ConfigError."""
    own = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        return load(name, **own, **options)
    except Exception as error:  # OSError, ValueError, SafetensorError, ImportError, HTTP errors ...
        offline = distributed.is_set("HF_HUB_OFFLINE") and not os.path.exists(name)
        where = " (HF_HUB_OFFLINE is set, so only the local cache was searched)" if offline else ""
        reason = repr(error) if isinstance(error, KeyError) else " ".join(str(error).split())
        if len(reason) > LONGEST_REASON:  # such as a list of all model types
            reason = f"{reason[:LONGEST_REASON]} ..."
        raise ConfigError(f"{what} {name!r} cannot be loaded: {reason}{where}") from error
