"""Which layers are adapted, which are not, and why; found before sampling starts.

`cover` runs one forward pass over a few tokens. A layer can be adapted if the pass calls it once, with one
row per token, if it returns one row per token, and if PEFT's LoRA supports it. The last is tested on a copy
of the module tree that shares the weights, so that the model is not modified. With ``"all-linear"``, layers
that cannot be adapted are skipped and reported; a layer named in ``adapter.target_modules`` raises.

`cover_config` does the same for a model that is not loaded, by a forward pass on the meta device. A prepared
4D mask avoids code that depends on mask values, and experts use the implementation that computes all tokens
at once. If the forward pass still depends on values (older expert code, for example), it runs on the CPU with
random weights that share one small buffer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from folora.adapters.initialization import check_singular_values
from folora.adapters.lora_refusals import lora_refusals, short, wildcard_name, with_parents
from folora.calibration.inputs import (
    Batch,
    LayerCall,
    group_by_input,
    linear_dims,
    target_layers,
    trace_calls,
)
from folora.config import FoLoraConfig
from folora.data.special_tokens import known_tokens
from folora.errors import ConfigError, FoLoraError
from folora.runtime.architecture import check_model
from folora.runtime.contexts import evaluating
from folora.runtime.loading import load_skeleton
from folora.spectral.groups import InputGroup
from folora.spectral.layers import check_rank

logger = logging.getLogger(__name__)

NOT_CAUSAL = 1e-2  # relative to the largest logit; bf16 rounding is below
NOT_CALLED = "the forward pass over text does not call it"
ROWS, TOKENS = 2, 8  # of the probe; unequal, to distinguish (tokens, rows) from (rows, tokens)
PADDED = 3  # padding tokens of the second row
MIN_SHARE = 0.001  # smaller parts of the weights are summed up in the report


@dataclass(frozen=True)
class Coverage:
    """What is adapted and what is not.

    Attributes:
        groups: Shared inputs of the adapted layers.
        layers: Adapted layers, (d_in, d_out) by name.
        left_out: Linear layers that cannot be adapted, with the reason.
        weights: Number of weights in the model.
        embeddings: Number of weights in the embeddings and the output layer.
        others: (module, number of weights, reason) of each part that is not adapted; indices are ``*``.
    """

    groups: list[InputGroup]
    layers: dict[str, tuple[int, int]]
    left_out: dict[str, str]
    weights: int
    embeddings: int
    others: list[tuple[str, int, str]]

    @property
    def adapted(self) -> int:
        """Number of weights in adapted layers."""
        return sum(d_in * d_out for d_in, d_out in self.layers.values())

    @property
    def share(self) -> float:
        """Fraction of the weights outside embeddings and output layer that is in adapted layers."""
        return self.adapted / max(self.weights - self.embeddings, 1)

    def lines(self) -> list[str]:
        """The report: what is adapted, and each part that is not, with its share and the reason."""
        kinds = sorted({name.rsplit(".", 1)[-1] for name in self.layers})
        return [
            f"adapted: {self.adapted / self.weights:.1%} of {self.weights:,} weights "
            f"({self.share:.1%} without embeddings): {len(self.layers)} linear layers "
            f"({', '.join(kinds)})",
            *(
                f"not adapted: {name}, {size / self.weights:.1%} ({reason})"
                for name, size, reason in self.others
            ),
        ]


def report(coverage: Coverage) -> None:
    """Log what is adapted and what is not; see `warn_if_few_adapted`."""
    for line in coverage.lines():
        logger.info(line)
    warn_if_few_adapted(coverage)


def warn_if_few_adapted(coverage: Coverage) -> None:
    """Log a warning if less than half of the weights outside embeddings is adapted."""
    if coverage.share < 0.5:
        logger.warning(
            "LoRA adapts %.1f %% of the weights outside embeddings; not adapted: %s",
            100 * coverage.share,
            "; ".join(f"{name} {size / coverage.weights:.1%}" for name, size, _ in coverage.others),
        )


def cover(model: PreTrainedModel, config: FoLoraConfig, batch: Batch) -> Coverage:
    """Find the layers to adapt, and check that they can be, by a forward pass over a few tokens.

    The model may be on the meta device; the batch has shape (batch, tokens) with batch != tokens.

    Raises:
        ConfigError: No layer can be adapted, a named layer cannot, or the adapter does not fit.
    """
    wanted = target_layers(model, config.adapter.target_modules)
    seen = trace_calls(model, wanted, batch)
    _check_attention(model, seen)
    shape = tuple(batch["input_ids"].shape)
    refused = _not_adaptable(model, wanted, seen, shape)
    refused |= lora_refusals(model, [n for n in wanted if n not in refused])
    if refused and config.adapter.target_modules != "all-linear":
        name = next(n for n in wanted if n in refused)
        raise ConfigError(
            f"adapter.target_modules selects {name}, which cannot be adapted: {refused[name]}. "
            f"Leave it out ({len(refused)} such layers)."
        )
    layers = {name: dims for name, dims in wanted.items() if name not in refused}
    if not layers:
        name, reason = next(iter(refused.items()))
        raise ConfigError(
            f"{type(model).__name__} has no linear layer that can be adapted; {name}: {reason}"
        )
    groups = group_by_input(seen, layers)
    check_adapter(model, groups, config)
    weights, embeddings, others = _rest(model, layers, refused, seen)
    return Coverage(groups, layers, refused, weights, embeddings, others)


def cover_config(config: FoLoraConfig, model_config: Any) -> tuple[PreTrainedModel, Coverage]:
    """`cover` for a model that is not loaded; also returns the model on the meta device.

    Raises:
        ConfigError: As `cover`; or the model is not a causal LM, or does not run on text alone.
    """
    with torch.device("meta"):
        skeleton = load_skeleton(config, model_config)
    check_model(skeleton)
    with suppress(AttributeError, ValueError):  # older transformers; a model without experts
        skeleton.set_experts_implementation("batched_mm")
    skeleton.eval()
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long, device="meta")
    mask = torch.zeros(ROWS, 1, TOKENS, TOKENS, device="meta")
    for masks in ({"attention_mask": mask}, {}):  # some models do not accept a 4D mask
        try:
            return skeleton, cover(skeleton, config, {"input_ids": ids, **masks})
        except FoLoraError:
            raise
        except Exception as error:
            logger.debug("no forward pass on the meta device: %s", error)
    handle = register_module_parameter_registration_hook(_on_meta)  # type: ignore[arg-type]
    try:
        on_cpu = load_skeleton(config, model_config).eval()
    finally:
        handle.remove()
    set_random_weights(on_cpu)
    check_causal(on_cpu, 0)
    return skeleton, cover(on_cpu, config, probe(on_cpu, 0))


def check_causal(model: PreTrainedModel, start_id: int) -> None:
    """Refuse a model that does not run on text alone, or whose predictions depend on later tokens.

    Raises:
        ConfigError: With the reason.
    """
    known = known_tokens(model)
    rows = torch.tensor([[start_id, token] for token in range(0, known, -(-known // 8))])
    try:
        with torch.no_grad(), evaluating(model):  # dropout would look like a dependence
            found = model(input_ids=rows.to(model.device), use_cache=False).logits
    except Exception as error:  # whatever the model's code raises
        raise ConfigError(
            f"{type(model).__name__} does not run on text alone: {short(error)}"
        ) from error
    first = found[:, 0].float()
    if float((first - first[0]).abs().max()) > NOT_CAUSAL * float(first.abs().max()):
        raise _not_causal(model)


def check_adapter(model: Any, groups: Iterable[InputGroup], config: FoLoraConfig) -> None:
    """Refuse a rank, initialization or constraint that a layer is too small for. Raises ConfigError."""
    groups = list(groups)
    check_rank(groups, config.adapter.r)
    layers = {
        name: dims
        for group in groups
        for name in group.layers
        if (dims := linear_dims(model.get_submodule(name)))
    }
    check_singular_values(layers, config.method.init, config.adapter.r, config.protected)


def probe(model: PreTrainedModel, start_id: int) -> Batch:
    """Two rows of tokens spread over the vocabulary, the second padded on the right."""
    known = known_tokens(model)
    ids = torch.arange(1, ROWS * TOKENS + 1).reshape(ROWS, TOKENS) * max(known // 32, 1) % known
    ids[:, 0] = start_id
    mask = torch.ones_like(ids)
    mask[1, TOKENS - PADDED :] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def set_random_weights(model: nn.Module) -> None:
    """Replace meta-device weights by random strided views of small buffers on the CPU.

    The entry at (i, j, ...) is element i + j + ... of a random vector. Tied weights remain tied.
    """
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(old) not in made:
                numbers = torch.rand(max(sum(old.shape), 1), generator=generator) - 0.5
                if old.ndim > 1:
                    new = (numbers / old.shape[-1] ** 0.5).as_strided(old.shape, (1,) * old.ndim)
                else:
                    new = 1 + numbers[: old.numel()].reshape(old.shape)
                made[id(old)] = nn.Parameter(new, requires_grad=False)
            module._parameters[name] = made[id(old)]


def _on_meta(module: nn.Module, name: str, weight: nn.Parameter) -> nn.Parameter | None:
    """Replace a parameter that is being registered by one on the meta device; buffers keep their values."""
    return None if weight is None or weight.is_meta else nn.Parameter(weight.to("meta"))


def _not_adaptable(
    model: nn.Module,
    layers: Mapping[str, tuple[int, int]],
    seen: Mapping[str, Sequence[LayerCall]],
    shape: tuple[int, ...],
) -> dict[str, str]:
    """The layers that cannot be adapted according to a forward pass, with the reason."""
    of_weight = Counter(
        id(weight)
        for name in layers
        if isinstance(weight := getattr(model.get_submodule(name), "weight", None), Tensor)
    )
    refused: dict[str, str] = {}
    routed: dict[str, str] = {}
    for name, dims in layers.items():
        calls = seen.get(name, [])
        read = calls[0].input_shape if calls else ()
        rows = tuple(n for n in read[:-1] if n != 1)
        if not calls:
            refused[name] = NOT_CALLED
        elif rows not in (shape, (prod(shape),)) or read[-1:] != dims[:1]:
            refused[name] = routed[wildcard_name(name)] = (
                f"its input has shape {list(read)} for {list(shape)} tokens, not one row per token"
            )
        elif len(calls) > 1:
            refused[name] = f"the forward pass calls it {len(calls)} times with different inputs"
        elif calls[0].output_shape != (*read[:-1], dims[1]):
            kind = type(model.get_submodule(name)).__name__
            refused[name] = f"{kind} does not return one row per token"
        elif of_weight[id(getattr(model.get_submodule(name), "weight", None))] > 1:
            refused[name] = "another layer has the same weight"
    # An expert that happened to get no token, or all of them, is treated like the other experts.
    return refused | {n: routed[wildcard_name(n)] for n in layers if wildcard_name(n) in routed}


def _check_attention(model: PreTrainedModel, seen: Iterable[str]) -> None:
    """Refuse attention with ``is_causal = False``, which a forward pass on the meta device cannot detect."""
    called = {part for name in seen for part in with_parents(name)}
    for name, module in model.named_modules():
        if name in called and getattr(module, "is_causal", None) is False:
            raise _not_causal(model)


def _not_causal(model: PreTrainedModel) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} attends to tokens that come after the one it predicts (as an encoder such as "
        "BERT does), but must be a causal LM"
    )


def _rest(
    model: PreTrainedModel,
    layers: Mapping[str, Any],
    refused: Mapping[str, str],
    seen: Iterable[str],
) -> tuple[int, int, list[tuple[str, int, str]]]:
    """Number of weights, number in embeddings and output layer, and the parts that are not adapted."""
    ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    uncalled = _uncalled_modules(refused, seen)
    known: set[int] = set()
    sizes: Counter[tuple[str, str]] = Counter()
    weights = embeddings = 0
    for name, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            if id(p) in known:
                continue
            known.add(id(p))
            dims = linear_dims(module) if leaf in ("weight", "qweight") else None
            size = prod(dims) if dims else p.numel()  # quantized weights are packed
            weights += size
            if id(module) in ends or isinstance(module, nn.Embedding):
                embeddings += size
                sizes["embeddings and output layer", "never adapted"] += size
            elif name in layers and leaf != "bias":
                continue
            elif top := next((t for t in uncalled if f"{name}.".startswith(f"{t}.")), None):
                sizes[wildcard_name(top), NOT_CALLED] += size
            elif name in refused:
                sizes[wildcard_name(name), refused[name]] += size
            elif p.ndim < 2:
                sizes["norms and biases", "vectors"] += size
            elif dims:
                sizes[wildcard_name(name), "not in adapter.target_modules"] += size
            else:
                sizes[wildcard_name(name), f"{type(module).__name__} is not a linear layer"] += size
    parts = [(name, size, reason) for (name, reason), size in sizes.most_common()]
    kinds = {*map(wildcard_name, refused)}
    large = [part for part in parts if part[1] >= MIN_SHARE * weights or part[0] in kinds]
    if small := sum(size for name, size, _ in parts if (name, size, _) not in large):
        large.append(("other modules", small, f"each less than {MIN_SHARE:.1%}"))
    return weights, embeddings, large


def _uncalled_modules(refused: Mapping[str, str], seen: Iterable[str]) -> list[str]:
    """The largest modules in which no linear layer is called, such as a vision tower."""
    called = {part for name in seen for part in with_parents(name)}
    tops = (
        next(part for part in with_parents(name) if part not in called)
        for name, reason in refused.items()
        if reason == NOT_CALLED
    )
    return list(dict.fromkeys(tops))
