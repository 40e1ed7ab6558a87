"""The matrix of architectures: one tiny random model of each, and what becomes of it.

A row says which layers are adapted and which are left out, or why the model is refused. It is the source of
docs/compatibility/architectures.json (``python -m tests.architectures``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "sliding_window": 16,
    "d_model": 32, "n_embd": 32, "n_layer": 2, "n_layers": 2, "num_layers": 2, "n_head": 4, "n_heads": 4,
    "num_heads": 8, "n_positions": 128, "n_inner": 64, "ffn_dim": 32, "word_embed_proj_dim": 32,
    "rotary_dim": 4, "d_ff": 32, "d_kv": 8, "decoder_layers": 2, "encoder_layers": 2, "decoder_ffn_dim": 32,
    "encoder_ffn_dim": 32, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "state_size": 8, "time_step_rank": 4, "expand": 2, "n_groups": 1,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_headdim": 8, "n_mamba_heads": 2, "mamba_dt_rank": 4,
    "embed_dim": 32, "projection_dim": 32, "image_size": 16, "patch_size": 8,
}  # fmt: skip
"""Small values of whatever of these a config has."""


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        kind: transformers' model type.
        family: What it is.
        adapted: Ends of the names of the adapted layers.
        left: Linear layers that are left out, with ``*`` for numbers.
        refused: Pattern of the message, if it is not accepted.
        head: Class to build, if it is not what AutoModelForCausalLM builds.
        changes: To the config.
    """

    kind: str
    family: str
    adapted: str = ""
    left: str = ""
    refused: str = ""
    head: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For tests and tables."""
        return f"{self.kind}-{self.head}" if self.head else self.kind


def tiny_config(kind: str, **changes: Any) -> PretrainedConfig:
    """A config of a model type with everything small."""
    make = CONFIG_MAPPING[kind]
    default = make()
    known = default.to_dict()
    values = {
        k: v for k, v in SHAPE.items() if k in known and not isinstance(known[k], list | dict)
    }
    for part in getattr(make, "sub_configs", None) or {}:
        own = getattr(default, part, None)
        if own is not None and own.model_type in CONFIG_MAPPING:
            values[part] = tiny_config(own.model_type, **changes.pop(part, {})).to_dict()
    return make(**{**values, **changes})


def build(case: Case) -> PreTrainedModel:
    """The model with random weights, the same every time, all of which matter."""
    torch.manual_seed(0)
    config = tiny_config(case.kind, **case.changes)
    if case.head:
        model = getattr(transformers, case.head)(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.is_floating_point():
            p.data.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.05))
    return model.eval().requires_grad_(False)
