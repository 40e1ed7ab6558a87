"""Which models are accepted: causal language models, which predict the next token of a text.

`check_config` decides from ``config.json``, before weights are loaded; `check_model` from the model
itself. Both errors name the architecture, its task and what is accepted.
"""

from __future__ import annotations

import re
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from folora.errors import ConfigError

MUST_BE = "must be a causal LM, which predicts the next token (LlamaForCausalLM, for example)"
KINDS = {
    "an encoder-decoder model": "SEQ_TO_SEQ_CAUSAL_LM|SPEECH_SEQ_2_SEQ",
    "a masked language model": "MASKED_LM|NEXT_SENTENCE_PREDICTION",
    "an image-text embedding model": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "a classifier": "(SEQUENCE|TOKEN|IMAGE|VIDEO|AUDIO|AUDIO_FRAME)_CLASSIFICATION|(TABLE_)?QUESTION_ANSWERING"
    "|MULTIPLE_CHOICE",
    "a vision or audio model": "MASKED_IMAGE_MODELING|(ZERO_SHOT_)?OBJECT_DETECTION|DEPTH_ESTIMATION|CTC"
    "|(SEMANTIC|INSTANCE|UNIVERSAL)_SEGMENTATION|AUDIO_XVECTOR|TEXT_TO_(SPECTROGRAM|WAVEFORM)",
}
"""Tasks of transformers' auto classes, by the kind of model; the first kind wins where several match."""


def _names(tasks: str) -> list[tuple[str, str]]:
    """Model types and class names of the tasks that this version of transformers has."""
    pattern = re.compile(f"MODEL_FOR_({tasks})_MAPPING_NAMES")
    found = [names for task, names in vars(modeling_auto).items() if pattern.fullmatch(task)]
    return [(kind, n) for names in found for kind, n in names.items() if isinstance(n, str)]


CAUSAL = {name for _, name in _names("CAUSAL_LM")}
OTHER_ARCHITECTURES = {
    name: what
    for what, tasks in reversed(KINDS.items())
    for _, name in _names(tasks)
    if name not in CAUSAL
}
"""Architectures that AutoModelForCausalLM refuses, or loads with an untrained head; by name, their kind."""


def size_limits(model_config: Any) -> dict[str, int | None]:
    """Vocabulary size and context length; None where the model's config does not give them."""
    text = model_config.get_text_config()
    found = {
        "vocabulary": getattr(text, "vocab_size", None),
        "context": getattr(text, "max_position_embeddings", None),
    }
    return {k: v if isinstance(v, int) and v > 0 else None for k, v in found.items()}


def check_config(model_config: Any, name: str) -> None:
    """Refuse a model that is not a causal LM, from its transformers config.

    Raises:
        ConfigError: It is not a causal LM; the architecture is named.
    """
    kind = getattr(model_config, "model_type", None)
    named = getattr(model_config, "architectures", None) or []
    if other := next((a for a in named if a in OTHER_ARCHITECTURES), None):
        raise ConfigError(
            f"model {name!r} is a {other}, {OTHER_ARCHITECTURES[other]}, but {MUST_BE}"
        )
    own_code = "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or {})
    if type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING or own_code:
        return
    called = named[0] if named else f"model of type {kind!r}"
    if kind in dict(_names("IMAGE_TEXT_TO_TEXT|MULTIMODAL_LM")) and not getattr(
        model_config, "is_encoder_decoder", False
    ):
        raise ConfigError(
            f"model {name!r} is a {called}, which reads images or audio as well; transformers' "
            "AutoModelForCausalLM does not load it. Load it with AutoModelForImageTextToText and give "
            "it to folora.prepare, which adapts the layers that text passes through."
        )
    raise ConfigError(
        f"model {name!r} is a {called}, for which transformers has no causal LM, but {MUST_BE}"
    )


def check_model(model: Any) -> None:
    """Refuse a model that is not a causal LM or already has an adapter, from its class and config.

    Raises:
        ConfigError: The model is refused; the message names its class and a remedy.
    """
    what = type(model).__name__
    if isinstance(model, PeftModel) or (
        isinstance(model, nn.Module) and any(isinstance(m, BaseTunerLayer) for m in model.modules())
    ):
        raise ConfigError(
            f"the model already has an adapter ({what}). Merge it first (model = "
            "model.merge_and_unload()), or remove it (model = model.unload())."
        )
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"the model is a {what}, but must be a transformers PreTrainedModel; give the model "
            "itself, before torch.compile or a wrapper for several devices"
        )
    if what in OTHER_ARCHITECTURES:
        raise ConfigError(f"the model is a {what}, {OTHER_ARCHITECTURES[what]}, but {MUST_BE}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(f"the model is a {what}, an encoder-decoder model, but {MUST_BE}")
    config = model.config
    if getattr(config, "is_decoder", None) is False and config.model_type in dict(
        _names("MASKED_LM")
    ):
        raise ConfigError(
            f"{what} looks at the tokens that come after the one it predicts (is_decoder is false in "
            f"its config), but {MUST_BE}"
        )
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ConfigError(
            f"the model is a {what}, which reads {model.main_input_name}, but {MUST_BE}"
        )
    if model.get_output_embeddings() is None:
        raise ConfigError(
            f"the model is a {what} without an output layer over a vocabulary, but {MUST_BE}"
        )
