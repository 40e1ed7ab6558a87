"""Options of earlier versions, each with what replaces it: files and flags that name one are refused."""

from __future__ import annotations

_METHOD = "it belongs to a method: give method, or in a file method: {{name: folora, {}: VALUE}}"
_SEED = (
    "one option, seed, replaces sampling.seed and data.seed; training.seed is for training alone"
)
_MOVED = {
    "adapter.init": "init",
    "adapter.constraint": "constraint",
    "adapter.protect": "protect",
    "adapter.freeze_a": "freeze_a",
    "spectrum.basis": "basis",
    "spectrum.step_scale": "step_scale",
    "training.optimizer": "optimizer",
    "training.replay": "replay",
    "training.kl_weight": "kl_weight",
    "training.masked_kl_weight": "masked_kl_weight",
}

REMEDIES = {
    **{name: _METHOD.format(ingredient) for name, ingredient in _MOVED.items()},
    "data.seed": _SEED,
    "sampling.seed": _SEED,
    "sampling.ignore_eos": "to sample through the end of documents, set eos_token_id to [] in the model's "
    "generation_config.json",
    "spectrum.beyond": "A moves along the first spectrum.directions eigenvectors alone; give more of them "
    "to move it along more",
    "spectrum.storage": "bases are float32 on the device of the model; give fewer spectrum.directions if "
    "they do not fit",
    "training.batch_size": "give training.per_device_train_batch_size, as trl.SFTConfig calls it",
    "training.extra": "give options of trl.SFTConfig by their own names, such as training.packing",
    "training.lr_b_ratio": "A and B have one learning rate; in Python folora.optimizer(..., lr_b_ratio=4) has LoRA+'s",
    "training.non_finite": "training always ends at a gradient with NaN or Inf; restart from the last "
    "checkpoint with a lower training.learning_rate",
    "training.warmup_ratio": "give training.warmup_steps, a share of the steps if it is below 1",
}
"""The remedy by the name of the option that was removed."""


def removal(name: str) -> str | None:
    """The sentence for an option that was removed; None for any other name."""
    return f"option {name!r} was removed: {REMEDIES[name]}" if name in REMEDIES else None
