"""The matrix of architectures: one tiny random model of each, and the expected result.

Each case has the adapted layers and those left out, or why the model is refused. It is the source of
docs/compatibility/architectures.json (``python -m tests.support.architectures``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.compatibility import write_section

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
"""Small values of config options."""


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        kind: transformers' model type.
        family: Family in the table.
        adapted: Last parts of the names of adapted layers.
        left: Linear layers that are not adapted, with ``*`` for indices.
        refused: Pattern of the error message if the model is refused.
        head: Class to build, if not that of AutoModelForCausalLM.
        cannot_sample: Why `generate` does not work here, if it does not.
        changes: Changes of the config.
    """

    kind: str
    family: str
    adapted: str = ""
    left: str = ""
    refused: str = ""
    head: str = ""
    cannot_sample: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name in tests and tables."""
        return f"{self.kind}-{self.head}" if self.head else self.kind


def tiny_config(kind: str, **changes: Any) -> PretrainedConfig:
    """A config of a model type with small values."""
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
    """The model with seeded random weights, all of which affect the output."""
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


LLAMA = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
ATTENTION = "k_proj o_proj q_proj v_proj"
LATENT = "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj"
DENSE_MLP = "model.layers.*.mlp.*_proj"
"""Dense layers and shared experts whose names PEFT mistakes for those of fused experts."""

CASES = [
    Case("llama", "dense", LLAMA),
    Case("mistral", "dense", LLAMA),
    Case("qwen2", "dense", LLAMA),
    Case("qwen3", "dense", LLAMA),
    Case("gemma", "dense", LLAMA),
    Case("gemma2", "dense", LLAMA),
    Case("gemma3_text", "dense", LLAMA),
    Case("phi", "dense", "dense fc1 fc2 k_proj q_proj v_proj"),
    Case("phi3", "dense", "down_proj gate_up_proj o_proj qkv_proj"),
    Case("olmo", "dense", LLAMA),
    Case("olmo2", "dense", LLAMA),
    Case("cohere", "dense", LLAMA),
    Case("granite", "dense", LLAMA),
    Case("smollm3", "dense", LLAMA),
    Case("starcoder2", "dense", "c_fc c_proj k_proj o_proj q_proj v_proj"),
    Case("stablelm", "dense", LLAMA),
    Case("falcon", "dense", "dense dense_4h_to_h dense_h_to_4h query_key_value"),
    Case("mpt", "dense", "Wqkv down_proj out_proj up_proj"),
    Case("bloom", "dense", "dense dense_4h_to_h dense_h_to_4h query_key_value"),
    Case("gptj", "dense", "fc_in fc_out k_proj out_proj q_proj v_proj"),
    Case("gpt_neox", "dense", "dense dense_4h_to_h dense_h_to_4h query_key_value"),
    Case("opt", "dense", "fc1 fc2 k_proj out_proj q_proj v_proj"),
    Case("gpt2", "dense", "c_attn c_fc c_proj"),
    Case("codegen", "dense", "fc_in fc_out out_proj qkv_proj"),
    Case("gpt_bigcode", "dense", "c_attn c_fc c_proj"),
    Case("biogpt", "dense", "fc1 fc2 k_proj out_proj q_proj v_proj"),
    Case("nemotron", "dense", "down_proj k_proj o_proj q_proj up_proj v_proj"),
    Case("glm", "dense", "down_proj gate_up_proj k_proj o_proj q_proj v_proj"),
    Case("glm4", "dense", "down_proj gate_up_proj k_proj o_proj q_proj v_proj"),
    Case("ernie4_5", "dense", LLAMA),
    Case("exaone4", "dense", LLAMA),
    Case("helium", "dense", LLAMA),
    Case("xglm", "dense", "fc1 fc2 k_proj out_proj q_proj v_proj"),
    Case("seed_oss", "dense", LLAMA),
    Case("hunyuan_v1_dense", "dense", LLAMA),
    Case("arcee", "dense", "down_proj k_proj o_proj q_proj up_proj v_proj"),
    Case("apertus", "dense", "down_proj k_proj o_proj q_proj up_proj v_proj"),
    Case("persimmon", "dense", "dense dense_4h_to_h dense_h_to_4h query_key_value"),
    Case("openai-gpt", "dense", "c_attn c_fc c_proj"),
    Case("modernbert-decoder", "dense", "Wi Wo k_proj q_proj v_proj", "lm_head.dense"),
    Case("diffllama", "dense", LLAMA),
    Case("nanochat", "dense", "fc1 fc2 k_proj o_proj q_proj v_proj"),
    Case("gpt_neo", "dense", "c_fc c_proj k_proj out_proj q_proj v_proj", changes={"attention_types": [[["global", "local"], 1]]}),
    Case("ctrl", "dense", "0 2 Wk Wq Wv dense", changes={"dff": 32}),
    Case("bert", "dense", "dense key query value", "cls.predictions.transform.dense", changes={"is_decoder": True}),
    Case("mixtral", "mixture of experts", ATTENTION),
    Case("qwen2_moe", "mixture of experts", "down_proj gate_proj k_proj o_proj q_proj shared_expert_gate up_proj v_proj"),
    Case("qwen3_moe", "mixture of experts", ATTENTION),
    Case("olmoe", "mixture of experts", ATTENTION),
    Case("granitemoe", "mixture of experts", ATTENTION),
    Case("glm4_moe", "mixture of experts", ATTENTION, DENSE_MLP),
    Case("gpt_oss", "mixture of experts", ATTENTION),
    Case("jetmoe", "mixture of experts", "kv_proj layer"),
    Case("phimoe", "mixture of experts", ATTENTION, "model.layers.*.mlp.router"),
    Case("ernie4_5_moe", "mixture of experts", ATTENTION, DENSE_MLP),
    Case("minimax", "mixture of experts", "k_proj o_proj out_proj output_gate q_proj qkv_proj v_proj"),
    Case("minimax_m2", "mixture of experts", ATTENTION),
    Case("dots1", "mixture of experts", ATTENTION, DENSE_MLP),
    Case("hunyuan_v1_moe", "mixture of experts", "k_proj o_proj q_proj v_proj wg", DENSE_MLP),
    Case("laguna", "mixture of experts", "down_proj g_proj gate_proj k_proj o_proj q_proj up_proj v_proj", "model.layers.*.mlp.shared_experts.*"),
    Case("aria_text", "mixture of experts", LLAMA),
    Case("qwen3_moe", "mixture of experts", ATTENTION, DENSE_MLP, changes={"mlp_only_layers": [0]}),
    Case("deepseek_v2", "mixture of experts", LATENT, DENSE_MLP, changes={"num_key_value_heads": 4}),
    Case("deepseek_v3", "mixture of experts", LATENT, DENSE_MLP, changes={"num_key_value_heads": 4}),
    Case("glm4_moe_lite", "mixture of experts", LATENT, DENSE_MLP, changes={"num_key_value_heads": 4}),
    Case("deepseek_v4", "mixture of experts", "down_proj gate_proj kv_proj o_b_proj q_a_proj q_b_proj up_proj", "model.layers.*.self_attn.o_a_proj", cannot_sample="no static cache", changes={"o_lora_rank": 8}),
    Case("dbrx", "mixture of experts", "Wqkv layer out_proj", changes={"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}}),
    Case("llama4_text", "mixture of experts", LLAMA, "model.layers.*.feed_forward.router", changes={"intermediate_size_mlp": 32, "moe_layers": [1]}),
    Case("mamba", "state space", "in_proj x_proj", "backbone.layers.*.mixer.dt_proj backbone.layers.*.mixer.out_proj"),
    Case("mamba2", "state space", "in_proj", "backbone.layers.*.mixer.out_proj"),
    Case("falcon_mamba", "state space", "in_proj x_proj", "backbone.layers.*.mixer.dt_proj backbone.layers.*.mixer.out_proj"),
    Case("rwkv", "state space", "key output receptance value"),
    Case("xlstm", "state space", "fgate_preact igate_preact k ogate_preact out_proj proj_down proj_up proj_up_gate q v", cannot_sample="a wrong state in generate"),
    Case("jamba", "hybrid", "down_proj gate_proj in_proj k_proj o_proj out_proj q_proj up_proj v_proj x_proj", "model.layers.*.mamba.dt_proj", changes={"attn_layer_period": 2, "attn_layer_offset": 1}),
    Case("bamba", "hybrid", "down_proj gate_proj in_proj k_proj o_proj out_proj q_proj up_proj v_proj", changes={"attn_layer_indices": [1]}),
    Case("qwen3_next", "hybrid", "in_proj_ba in_proj_qkvz k_proj o_proj out_proj q_proj shared_expert_gate v_proj", "model.layers.*.mlp.shared_expert.*", changes={"layer_types": ["linear_attention", "full_attention"]}),
    Case("qwen3_5_text", "hybrid", "down_proj gate_proj in_proj_a in_proj_b in_proj_qkv in_proj_z k_proj o_proj out_proj q_proj up_proj v_proj", changes={"layer_types": ["linear_attention", "full_attention"]}),
    Case("recurrent_gemma", "hybrid", "down_proj gate_proj k_proj linear_out linear_x linear_y o_proj q_proj up_proj v_proj", changes={"num_hidden_layers": 3}),
    Case("lfm2", "hybrid", "k_proj out_proj q_proj v_proj w1 w2 w3"),
    Case("granitemoehybrid", "hybrid", "in_proj input_linear k_proj o_proj out_proj output_linear q_proj v_proj", changes={"shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]}),
    Case("nemotron_h", "hybrid", "down_proj in_proj k_proj o_proj q_proj up_proj v_proj", "model.layers.*.mixer.out_proj", changes={"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "moe_shared_expert_intermediate_size": 16, "layers_block_type": ["mamba", "attention", "moe"]}),
    Case("falcon_h1", "hybrid", "down_proj gate_proj in_proj k_proj o_proj q_proj up_proj v_proj", "model.layers.*.mamba.out_proj", changes={"mamba_d_ssm": 64}),
    Case("lfm2_moe", "hybrid", "in_proj k_proj out_proj q_proj v_proj w1 w2 w3", changes={"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    Case("zamba2", "hybrid", "in_proj linear out_proj", "model.layers.*.shared_transformer.*", changes={"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "mamba_headdim": 16, "mamba_ngroups": 1, "n_mamba_heads": 4, "num_mem_blocks": 1, "attention_head_dim": 16, "adapter_rank": 4}),
    Case("olmo_hybrid", "hybrid", "a_proj b_proj down_proj g_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
    Case("hrm_text", "hybrid", refused="calls it 6 times"),
    Case("gemma3", "vision-language", LLAMA, "model.vision_tower.*"),
    Case("fuyu", "vision-language", "dense dense_4h_to_h dense_h_to_4h query_key_value", "model.vision_embed_tokens"),
    Case("qwen2_vl", "vision-language", LLAMA, "model.visual.*", head="Qwen2VLForConditionalGeneration", changes={"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}, "vision_config": {"embed_dim": 32, "hidden_size": 32, "depth": 1, "num_heads": 2}}),
    Case("qwen2_5_vl", "vision-language", LLAMA, "model.visual.*", head="Qwen2_5_VLForConditionalGeneration", changes={"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}, "vision_config": {"hidden_size": 32, "out_hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32}}),
    Case("qwen3_vl", "vision-language", LLAMA, "model.visual.*", head="Qwen3VLForConditionalGeneration", changes={"vision_config": {"hidden_size": 32, "out_hidden_size": 32, "depth": 1, "num_heads": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}}),
    Case("llava", "vision-language", LLAMA, "model.multi_modal_projector.* model.vision_tower.*", head="LlavaForConditionalGeneration"),
    Case("internvl", "vision-language", LLAMA, "model.multi_modal_projector.* model.vision_tower.*", head="InternVLForConditionalGeneration"),
    Case("smolvlm", "vision-language", LLAMA, "model.connector.modality_projection.proj model.vision_model.*", head="SmolVLMForConditionalGeneration"),
    Case("mistral3", "vision-language", LLAMA, "model.multi_modal_projector.* model.vision_tower.*", head="Mistral3ForConditionalGeneration"),
    Case("paligemma", "vision-language", refused="tokens that come after", head="PaliGemmaForConditionalGeneration"),
    Case("t5", "encoder-decoder", refused="an encoder-decoder model", head="T5ForConditionalGeneration"),
    Case("bart", "encoder-decoder", refused="an encoder-decoder model", head="BartForConditionalGeneration"),
    Case("whisper", "encoder-decoder", refused="an encoder-decoder model", head="WhisperForConditionalGeneration"),
    Case("mbart", "encoder-decoder", refused="an encoder-decoder model", head="MBartForConditionalGeneration"),
    Case("marian", "encoder-decoder", refused="an encoder-decoder model", head="MarianMTModel"),
    Case("vision-encoder-decoder", "encoder-decoder", refused="an encoder-decoder model", head="VisionEncoderDecoderModel"),
    Case("bart", "encoder-decoder", "fc1 fc2 k_proj out_proj q_proj v_proj", "model.decoder.*"),
    Case("bert", "encoder", refused="a masked language model", head="BertForMaskedLM"),
    Case("bert", "encoder", refused="is_decoder is false"),
    Case("roberta", "encoder", refused="is_decoder is false"),
    Case("megatron-bert", "encoder", refused="is_decoder is false"),
    Case("modernbert", "encoder", refused="a masked language model", head="ModernBertForMaskedLM"),
    Case("electra", "encoder", refused="is_decoder is false", head="ElectraForPreTraining"),
    Case("albert", "encoder", refused="a masked language model", head="AlbertForMaskedLM"),
    Case("xlnet", "encoder", refused="tokens that come after"),
    Case("xlm", "encoder", refused="tokens that come after", changes={"n_words": 64, "emb_dim": 32}),
    Case("llama", "classifier", refused="a classifier", head="LlamaForSequenceClassification"),
    Case("llama", "classifier", refused="a classifier", head="LlamaForTokenClassification"),
    Case("llama", "classifier", refused="a classifier", head="LlamaForQuestionAnswering"),
    Case("bert", "classifier", refused="a classifier", head="BertForSequenceClassification"),
    Case("gpt2", "classifier", refused="a classifier", head="GPT2ForSequenceClassification"),
    Case("vit", "classifier", refused="a classifier", head="ViTForImageClassification"),
    Case("vit", "embedding or vision model", refused="which reads pixel_values", head="ViTModel"),
    Case("clip", "embedding or vision model", refused="an image-text embedding model", head="CLIPModel"),
    Case("clip_text_model", "embedding or vision model", refused="without an output layer", head="CLIPTextModel"),
    Case("blip", "embedding or vision model", refused="which reads pixel_values", head="BlipForConditionalGeneration"),
    Case("dinov2", "embedding or vision model", refused="which reads pixel_values", head="Dinov2Model"),
    Case("llama", "embedding or vision model", refused="without an output layer", head="LlamaModel"),
    Case("bert", "embedding or vision model", refused="is_decoder is false", head="BertModel"),
]  # fmt: skip

TEXT = [
    f"Tiny random models of transformers {transformers.__version__}, made by `python -m tests.support.architectures` and tested by "
    "`tests/adapters/test_architectures.py`. What works is exact before the first step, has the layers that are named here, "
    "trains, and gives equal logits in stock PEFT and merged. What is refused is refused by its config, in seconds. "
    "Numbers in names are `*`. Experts that are fused into one weight, routers and embeddings are never adapted; "
    "folora says what share of the weights that is before a run.",
]
COLUMNS = ["architecture", "family", "outcome", "adapted", "linear layers left out"]


def table() -> list[dict[str, str]]:
    """The expected table in docs/compatibility.md."""
    return [
        {
            "architecture": case.head
            or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[case.kind]].__name__,
            "family": case.family,
            "outcome": _outcome(case),
            "adapted": case.adapted,
            "linear layers left out": case.left.replace("*", r"\*"),
        }
        for case in CASES
    ]


def _outcome(case: Case) -> str:
    if case.refused:
        return f"refused: {case.refused}"
    return (
        f"works, but samples must come from elsewhere ({case.cannot_sample})"
        if case.cannot_sample
        else "works"
    )


if __name__ == "__main__":
    write_section("architectures", "Architectures", TEXT, COLUMNS, table())
