"""Rivals from PEFT that are not pairs A, B of LoRA: BD-LoRA (block-diagonal factors) and OFT (rotated inputs).

Both are PEFT's own adapters, trained by AdamW on the loss that every arm has, the anchor's included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import peft
import torch
from peft import LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.oft import OFTLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from folora.adapters.adapter import Factors
from folora.compare.rivals import Rival
from folora.config import FoLoraConfig
from folora.errors import ConfigError
from folora.methods import Method
from folora.optim.fused import FusedSAdam
from folora.optim.sadam import SAdam
from folora.spectral.layers import GroupBasis
from folora.training.hyperparameters import adam_options
from folora.training.prepared import AdapterKind

BLOCKS = 2  # of a block-diagonal factor, as in PEFT's own comparison (method_comparison/MetaMathQA)
ADAPTER = "default"


def block_diagonal(model: PreTrainedModel, layers: Collection[str]) -> dict[str, str]:
    """Which factor of each layer is block-diagonal: ``"a"`` if it is split by rows, ``"b"`` if by columns.

    That is what the model's plan for tensor parallelism says, as PEFT's guide asks: B of q, k, v, gate and up; A of
    o and down. (The examples in PEFT's descriptions of the two lists are the other way round than its code.)

    Raises:
        ConfigError: The plan does not split a layer.
    """
    plan: dict[str, str] = getattr(model.config, "base_model_tp_plan", None) or {}
    split = {f"{model.base_model_prefix}.{name}": kind for name, kind in plan.items()}
    found = {}
    for layer in layers:
        kind = split.get(re.sub(r"\.\d+(?=\.|$)", ".*", layer), "")
        if not ("rowwise" in kind or "colwise" in kind):
            raise ConfigError(
                f"bd-lora cannot adapt {layer}: the tensor parallel plan of {type(model).__name__} splits it "
                f"neither by rows nor by columns ({kind or 'it is not named'}); leave it out of adapter.target_modules"
            )
        found[layer] = "a" if "rowwise" in kind else "b"
    return found


def check_bd_lora(model: PreTrainedModel, layers: Collection[str], config: FoLoraConfig) -> None:
    """Refuse what BD-LoRA cannot do. Raises ConfigError."""
    if "use_bdlora" not in {field.name for field in fields(LoraConfig)}:
        raise ConfigError(
            f"bd-lora needs PEFT 0.19 or later, but {peft.__version__} is installed: pip install --upgrade peft"
        )
    for name, factor in block_diagonal(model, layers).items():
        linear = _linear("bd-lora", model, name)
        width = linear.in_features if factor == "a" else linear.out_features
        for what, size in (("adapter.r", config.adapter.r), (f"the width of {name}", width)):
            if size % BLOCKS:
                raise ConfigError(f"bd-lora: {what} is {size}, but must be a multiple of {BLOCKS}")


def adapt_bd_lora(
    model: PreTrainedModel, bases: Sequence[GroupBasis], config: FoLoraConfig
) -> tuple[PeftModel, SAdam]:
    """LoRA of ``adapter.r`` and ``adapter.alpha`` with one factor of every layer block-diagonal."""
    from peft.tuners.lora.config import BdLoraConfig

    adapter, blocks = config.adapter, block_diagonal(model, _layers(bases))
    of = {factor: [name for name, found in blocks.items() if found == factor] for factor in "ab"}
    alpha: Any = adapter.r if adapter.alpha is None else adapter.alpha
    return _adapted(model, config, LoraConfig(
        r=adapter.r, lora_alpha=alpha, target_modules=[*blocks], task_type="CAUSAL_LM",
        use_bdlora=BdLoraConfig(target_modules_bd_a=of["a"], target_modules_bd_b=of["b"], nblocks=BLOCKS),
    ))  # fmt: skip


def bd_lora_factors(model: PeftModel) -> Factors:
    """A (r, d_in), B (d_out, r) and kappa, with the zeros outside of the blocks."""

    def dense(part: Any) -> Tensor:
        found = getattr(part, "weight_as_blockdiagonal_matrix", lambda: part.weight)()
        return found.detach()  # type: ignore[no-any-return]

    return _factors(model, LoraLayer, lambda layer: (
        dense(layer.lora_A[ADAPTER]), dense(layer.lora_B[ADAPTER]), layer.scaling[ADAPTER],
    ))  # fmt: skip


def block_size(config: FoLoraConfig) -> int:
    """Width of OFT's blocks: as many parameters as LoRA of ``adapter.r`` has in a square layer.

    A block of width b has b (b - 1) / 2, so that a layer has d_in (b - 1) / 2, and LoRA r (d_in + d_out). For
    r = 8 it is PEFT's default, 32.
    """
    return 4 * config.adapter.r


def check_oft(model: PreTrainedModel, layers: Collection[str], config: FoLoraConfig) -> None:
    """Refuse what OFT cannot do. Raises ConfigError."""
    if config.adapter.alpha is not None:
        raise ConfigError(
            f"adapter.alpha is {config.adapter.alpha}, but oft has no such scale; leave it out"
        )
    for name in layers:
        if (width := _linear("oft", model, name).in_features) % block_size(config):
            raise ConfigError(
                f"oft: adapter.r is {config.adapter.r}, for blocks of {block_size(config)}, but the width of {name}, "
                f"{width}, must be a multiple of 4 adapter.r"
            )


def adapt_oft(
    model: PreTrainedModel, bases: Sequence[GroupBasis], config: FoLoraConfig
) -> tuple[PeftModel, SAdam]:
    """A rotation of every layer's input, exact: PEFT's default is a truncated series, which is none at large steps."""
    return _adapted(model, config, OFTConfig(
        oft_block_size=block_size(config), target_modules=_layers(bases), use_cayley_neumann=False, task_type="CAUSAL_LM",
    ))  # fmt: skip


def oft_factors(model: PeftModel) -> Factors:
    """The update W (R - I)' as A = (R - I)' (d_in, d_in) and B = W."""

    def of(layer: Any) -> tuple[Tensor, Tensor, float]:
        rotation = layer.get_delta_weight(ADAPTER).detach().double()
        turn = rotation - torch.eye(len(rotation), device=rotation.device)
        return turn.T, layer.get_base_layer().weight.detach(), 1.0

    return _factors(model, OFTLayer, of)


@contextmanager
def turned_in_part(model: PeftModel, scale: float) -> Iterator[None]:
    """Scale Cayley's parameter Q while a block runs: (I - s Q) (I + s Q)^-1 is a rotation for every s."""
    trained = {
        p.detach(): p.detach().clone() for n, p in model.named_parameters() if ".oft_R." in n
    }
    try:
        for weight in trained:
            weight.mul_(scale)
        yield
    finally:
        for weight, kept in trained.items():
            weight.copy_(kept)


def _linear(rival: str, model: PreTrainedModel, name: str) -> nn.Linear:
    """A layer of the model. Raises ConfigError if it is no plain linear layer."""
    layer = model.get_submodule(name)
    if type(layer) is not nn.Linear:
        raise ConfigError(
            f"{rival} cannot adapt {name}, a {type(layer).__name__}: it must be a torch.nn.Linear"
        )
    return layer


def _layers(bases: Sequence[GroupBasis]) -> list[str]:
    return [name for b in bases for name in b.group.layers]


def _adapted(
    model: PreTrainedModel, config: FoLoraConfig, adapter: PeftConfig
) -> tuple[PeftModel, SAdam]:
    """PEFT's own model of an adapter, with random numbers from the training's seed, and AdamW."""
    with torch.random.fork_rng():
        torch.manual_seed(config.training_seed)
        adapted: Any = get_peft_model(model, adapter, adapter_name=ADAPTER)
    training = config.training
    made = FusedSAdam(
        [p for p in adapted.parameters() if p.requires_grad],
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        **adam_options(training),
    )
    return adapted, made


def _factors(
    model: PeftModel, kind: type, of: Callable[[Any], tuple[Tensor, Tensor, float]]
) -> Factors:
    return {
        name: of(layer)
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, kind)
    }


def _method(name: str, title: str, about: str) -> Method:
    return Method(
        name=name, title=title, about=about, adapter="own", optimizer="adamw", init="kaiming"
    )


RIVALS = (
    Rival(
        _method("bd-lora", "BD-LoRA", "arXiv:2510.23346"),
        AdapterKind(adapt_bd_lora, bd_lora_factors),
        check_bd_lora,
    ),
    Rival(
        _method("oft", "OFT", "arXiv:2306.07280"),
        AdapterKind(adapt_oft, oft_factors, turned_in_part),
        check_oft,
    ),
)
