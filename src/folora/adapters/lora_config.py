"""An adapter_config.json that is the same whatever the hash seed, and that other programs can read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's ``--max-lora-rank`` (it takes 1, too, which no adapter needs)."""


class SortedLoraConfig(LoraConfig):
    """PEFT's LoraConfig, which is saved with its sets as sorted lists.

    PEFT keeps ``target_modules`` as a set and saves it in the set's order, which depends on
    PYTHONHASHSEED. In memory it stays a set, as PEFT's own functions require.
    """

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sorted lists."""
        values: dict[str, Any] = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}


def lora_config(
    names: Iterable[str],
    r: int,
    alpha: float,
    *,
    fan_in_fan_out: bool,
    base_model: str | None = None,
    inference_mode: bool = False,
) -> LoraConfig:
    """The config of an ordinary LoRA adapter on named layers.

    Args:
        names: Of the layers, in full.
        r: Rank.
        alpha: PEFT's lora_alpha, written as an integer where it is one.
        fan_in_fan_out: Whether the layers are Conv1D.
        base_model: Name on the Hub or local folder; see `resolvable`.
        inference_mode: True for an adapter that is loaded to be used.
    """
    return SortedLoraConfig(
        r=r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        target_modules=sorted(names),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=fan_in_fan_out,
        base_model_name_or_path=resolvable(base_model),
        inference_mode=inference_mode,
    )


def resolvable(name: str | None) -> str | None:
    """The name of a base model that is the same from every working directory.

    A local folder becomes absolute; a name on the Hub stays.
    """
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def max_lora_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` with which vLLM serves an adapter; None if its rank is too large."""
    return next((allowed for allowed in VLLM_RANKS if rank <= allowed), None)
