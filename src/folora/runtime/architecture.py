"""Which models are accepted: causal language models, which predict the next token of a text.

`check_config` decides from ``config.json``, before weights are loaded; `check_model` from the model
itself. Both errors name the architecture, its task and what is accepted.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from folora.errors import ConfigError

MUST_BE = "must be a causal LM, which predicts the next token (LlamaForCausalLM, for example)"
TASKS = {
    "an encoder-decoder model": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    "a masked language model": ("MASKED_LM", "NEXT_SENTENCE_PREDICTION"),
    "an image-text embedding model": ("ZERO_SHOT_IMAGE_CLASSIFICATION",),
    "a classifier": (
        "SEQUENCE_CLASSIFICATION",
        "TOKEN_CLASSIFICATION",
        "QUESTION_ANSWERING",
        "TABLE_QUESTION_ANSWERING",
        "MULTIPLE_CHOICE",
        "IMAGE_CLASSIFICATION",
        "VIDEO_CLASSIFICATION",
        "AUDIO_CLASSIFICATION",
        "AUDIO_FRAME_CLASSIFICATION",
    ),
    "a vision or audio model": (
        "MASKED_IMAGE_MODELING",
        "OBJECT_DETECTION",
        "ZERO_SHOT_OBJECT_DETECTION",
        "SEMANTIC_SEGMENTATION",
        "INSTANCE_SEGMENTATION",
        "UNIVERSAL_SEGMENTATION",
        "DEPTH_ESTIMATION",
        "CTC",
        "AUDIO_XVECTOR",
        "TEXT_TO_SPECTROGRAM",
        "TEXT_TO_WAVEFORM",
    ),
}
"""Tasks of transformers' auto classes, by the kind of model; the first kind wins where several match."""
MULTIMODAL = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")


def _names(task: str) -> dict[str, str]:
    """Class names by model type; empty if this version of transformers lacks the task."""
    found = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
    return {kind: name for kind, name in found.items() if isinstance(name, str)}


CAUSAL = set(_names("CAUSAL_LM").values())
OTHER_ARCHITECTURES = {
    name: what
    for what, tasks in reversed(TASKS.items())
    for task in tasks
    for name in _names(task).values()
    if name not in CAUSAL
}
"""Architectures that AutoModelForCausalLM refuses, or loads with an untrained head; by name, their kind."""


def check_config(model_config: Any, name: str) -> None:
    """Refuse a model that is not a causal LM, from its config.

    Args:
        model_config: From transformers' AutoConfig.
        name: Name of the model, for the message.

    Raises:
        ConfigError: It is not a causal LM; the architecture is named.
    """
    kind = getattr(model_config, "model_type", None)
    named = getattr(model_config, "architectures", None) or []
    for architecture in named:
        if architecture in OTHER_ARCHITECTURES:
            what = OTHER_ARCHITECTURES[architecture]
            raise ConfigError(f"model {name!r} is a {architecture}, {what}, but {MUST_BE}")
    own_code = "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or {})
    if type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING or own_code:
        return
    multimodal = {k: v for task in MULTIMODAL for k, v in _names(task).items()}
    called = named[0] if named else f"model of type {kind!r}"
    if kind in multimodal and not getattr(model_config, "is_encoder_decoder", False):
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

    Args:
        model: The caller's model, or one without weights on the meta device.

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
    if getattr(config, "is_decoder", None) is False and config.model_type in _names("MASKED_LM"):
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
