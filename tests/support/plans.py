"""The base of a benchmark plan whose arms take about a second each on a tiny model."""

from __future__ import annotations

TINY_PLAN_BASE = {
    "dtype": "float32",
    "device": "cpu",
    "sampling.num_sequences": 36,
    "sampling.min_new_tokens": 32,
    "sampling.max_new_tokens": 32,
    "statistics.task_examples": 8,
    "training.max_steps": 4,
    "training.per_device_train_batch_size": 2,
    "adapter.r": 2,
}
