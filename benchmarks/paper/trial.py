"""A recipe reduced to a minute on a tiny random model, otherwise unchanged.

Same data sets, columns, prompts, methods, questions, extraction and metrics; a few rows, steps and
documents. What would fail after hours fails here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.paper.recipe import Recipe
from folora.runtime.loading import load_tokenizer, required

DOCUMENTS = 2  # of every task
NEW_TOKENS = 8
ROWS = 20
RANK = 2
LENGTH = 2048  # tokens that the random model reads; longer questions lose their beginning

CHANGES = {
    "dtype": "float32",
    "device": "cpu",
    "sampling.num_sequences": 36,
    "sampling.min_new_tokens": 32,
    "sampling.max_new_tokens": 32,
    "statistics.task_examples": 4,
    "data.max_length": 128,
    "data.eval_rows": 2,
    "adapter.r": RANK,
    "training.max_steps": 2,
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "training.gradient_checkpointing": False,
    "training.bf16": False,
}


def small(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe for a trial; its random model, with the real model's tokenizer, is put in `folder`."""
    tokenizer = load_tokenizer(recipe.config, required(recipe.config.model, "model"))
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    model = folder / "model"
    LlamaForCausalLM(shape).save_pretrained(model)
    tokenizer.save_pretrained(model)
    alpha = recipe.config.adapter.scaling * RANK
    return replace(
        recipe,
        base={**recipe.base, **CHANGES, "adapter.alpha": alpha, "model": str(model)},
        data=replace(recipe.data, count=ROWS),
        methods={method: rates[:1] for method, rates in recipe.methods.items()},
        seeds=recipe.seeds[:1],
        benchmarks={
            name: replace(benchmark, limit=DOCUMENTS)
            for name, benchmark in recipe.benchmarks.items()
        },
        passages={
            name: replace(passages, count=DOCUMENTS) for name, passages in recipe.passages.items()
        },
    )
