"""What becomes of each option of trl.SFTConfig in the section ``training``: one table.

An option is passed on, or it is set by an option of folora, or it is refused with the reason. What a
newer TRL adds is passed on with a warning. The table needs no TRL.
"""

from __future__ import annotations

import logging
from typing import Any

from folora.config import FoLoraConfig

logger = logging.getLogger(__name__)

SET_BY = {
    "activation_checkpointing": "training.gradient_checkpointing",
    "eval_strategy": "training.eval_steps",
    "no_cuda": "device",
    "optim": "method",
    "output_dir": "output",
    "per_device_eval_batch_size": "statistics.batch_size",
    "trust_remote_code": "trust_remote_code",
    "truncation_mode": "data.max_length",
    "use_cpu": "device",
    "warmup_ratio": "training.warmup_steps",
}
"""Options with an option of folora that is used instead."""

_METER = "evaluation reads folora's meter, which has no such option"
_HUB = "folora pushes nothing to the Hub; upload the exported adapter"
_ROWS = "folora has made tokens and labels of the rows by then"
_RESUME = "folora resumes from the latest checkpoint in the output folder"
_OPTIMIZER = "the optimizer is SAdam, or AdamW by --method lora"
_PROCESSES = "folora connects the processes itself"
_SCRIPT = "the Trainer itself does not read it"

REFUSED = {
    "assistant_only_loss": "the loss is on the assistant's tokens already",
    "auto_find_batch_size": "it changes the rows of a step while training; give --training.per_device_train_batch_size",
    "batch_eval_metrics": _METER,
    "bf16_full_eval": _METER,
    "chat_template_path": f"{_ROWS}; save the template with the tokenizer",
    "completion_only_loss": "the loss is on the response alone already",
    "dataset_kwargs": _ROWS,
    "dataset_text_field": _ROWS,
    "ddp_backend": _PROCESSES,
    "ddp_timeout": _PROCESSES,
    "do_eval": _SCRIPT,
    "do_predict": _SCRIPT,
    "do_train": _SCRIPT,
    "enable_jit_checkpoint": "folora writes a checkpoint at SIGTERM itself",
    "eos_token": f"{_ROWS}; set it in the tokenizer",
    "eval_accumulation_steps": _METER,
    "eval_do_concat_batches": _METER,
    "eval_packing": _METER,
    "eval_use_gather_object": _METER,
    "fp16_full_eval": _METER,
    "hub_always_push": _HUB,
    "hub_model_id": _HUB,
    "hub_private_repo": _HUB,
    "hub_revision": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "include_for_metrics": _METER,
    "label_names": _ROWS,
    "length_column_name": "folora's rows have no such column; lengths are counted",
    "load_best_model_at_end": "report and export are about the last step",
    "local_rank": "the launcher sets it",
    "model_init_kwargs": "folora loads the model, by --dtype, --quantize and the like",
    "optim_args": _OPTIMIZER,
    "optim_target_modules": _OPTIMIZER,
    "overwrite_output_dir": _RESUME,
    "pad_token": f"{_ROWS}; set it in the tokenizer",
    "parallelism_config": "the optimizer needs whole rows of the adapter's matrices; use FSDP2",
    "prediction_loss_only": _METER,
    "push_to_hub": _HUB,
    "resume_from_checkpoint": _RESUME,
    "save_on_each_node": "all processes share one output folder",
    "save_only_model": "training could not resume without the optimizer's state",
}
"""Options that could not be honoured, and why."""

HONOURED = frozenset(
    {
        "accelerator_config",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "average_tokens_across_devices",
        "bf16",
        "data_seed",
        "dataloader_drop_last",
        "dataloader_in_order",
        "ddp_broadcast_buffers",
        "deepspeed",  # is refused with its own reason, as when a launcher asks for it
        "fp16",
        "fsdp",
        "fsdp_config",
        "full_determinism",
        "greater_is_better",
        "group_by_length",
        "ignore_data_skip",
        "label_smoothing_factor",
        "learning_rate",
        "liger_kernel_config",
        "loss_type",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_grad_norm",
        "max_length",  # with packing alone
        "max_steps",
        "metric_for_best_model",
        "neftune_noise_alpha",
        "num_train_epochs",
        "packing",
        "packing_strategy",
        "pad_to_multiple_of",
        "padding_free",
        "restore_callback_states_from_checkpoint",
        "router_aux_loss_coef",
        "seed",
        "shuffle_dataset",
        "tf32",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "train_sampling_strategy",
        "use_liger_kernel",
        "warmup_steps",
        "weight_decay",
    }
)
"""Options that are passed on and change the result."""

WITHOUT_EFFECT = frozenset(
    {
        "activation_checkpointing_kwargs",
        "activation_offloading",
        "dataloader_multiprocessing_context",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataset_num_proc",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "debug",
        "disable_tqdm",
        "eval_delay",
        "eval_on_start",
        "eval_steps",
        "gradient_accumulation_steps",  # as long as a step takes as many rows, like the batch size
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "include_num_input_tokens_seen",
        "include_tokens_per_second",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_dir",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_steps",
        "logging_strategy",
        "per_device_train_batch_size",
        "project",
        "remove_unused_columns",
        "report_to",
        "run_name",
        "save_safetensors",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "skip_memory_metrics",
        "torch_empty_cache_steps",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
        "use_cache",
    }
)
"""Options that are passed on and leave the result as it is, so that they may change in between."""

METRICS = ("loss", "kl", "ce_change", "frobenius", "h_norm")  # of `FoLoraTrainer.evaluate`
CHOICES = {
    "metric_for_best_model": (*METRICS, *(f"eval_{name}" for name in METRICS)),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
}
"""Values of options that take any text; others would fail in training, or fall back to a default."""

KNOWN = frozenset({*SET_BY, *REFUSED, *HONOURED, *WITHOUT_EFFECT})

EVALUATION = frozenset({"eval_delay", "eval_on_start", "eval_steps"})
BY_METRIC = frozenset({"reduce_lr_on_plateau", "greedy"})  # schedules that follow evaluations


def refusal(name: str, value: object) -> str | None:
    """Why ``training`` must not have an option of SFTConfig with a value; None if it may."""
    if name in SET_BY:
        return f"training.{name} is set by {SET_BY[name]}; give that instead"
    if name in REFUSED:
        return f"training.{name} is not honoured: {REFUSED[name]}"
    if name in CHOICES and value not in CHOICES[name]:
        return f"training.{name} is {value!r}, but must be one of {', '.join(CHOICES[name])}"
    if name not in KNOWN:
        logger.warning("folora does not know TRL's training.%s and passes it on", name)
    return None


def effective(config: FoLoraConfig) -> dict[str, Any]:
    """Of the section ``training`` those options that change the result, with the seed."""
    training = config.training
    plain = training.lr_scheduler_type not in BY_METRIC
    without = WITHOUT_EFFECT if plain else WITHOUT_EFFECT - EVALUATION
    found = {name: value for name, value in training.model_dump().items() if name not in without}
    return {**found, "seed": config.training_seed}
