"""Which layers are adapted, and which of them read the same tensor.

Layers that read the same tensor (q, k and v; gate and up) share one covariance. They are found by watching
one forward pass: two layers belong together if they receive the same tensor object, unchanged in between.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from folora.errors import ConfigError, nearest
from folora.runtime.contexts import evaluating
from folora.spectral.groups import InputGroup

Batch = dict[str, Tensor]


def linear_dims(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer: nn.Linear, its quantized kin, GPT-2's Conv1D; else None."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Linear):  # bitsandbytes' and torchao's layers derive from it
        return module.in_features, module.out_features
    if hasattr(module, "qweight") and hasattr(module, "in_features"):  # GPTQ, AWQ
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return None


def target_layers(
    model: nn.Module, target_modules: str | Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Names of the linear layers to adapt, with (d_in, d_out), in the order of the model.

    Args:
        model: The base model, or its skeleton on the meta device.
        target_modules: ``"all-linear"`` (all but the output layer), a list of names of which each
            matches a layer's whole name or its end after a dot, or a regular expression that
            matches the whole name. The same meanings as in PEFT.

    Raises:
        ConfigError: Nothing matches, a named module is missing or is no linear layer, or the output
            layer is among them.
    """
    linear = {n: dims for n, m in model.named_modules() if (dims := linear_dims(m)) is not None}
    if not linear:
        raise ConfigError(f"{type(model).__name__} has no linear layers to adapt")
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if target_modules == "all-linear":
        names = [n for n in linear if model.get_submodule(n) is not head]
    elif isinstance(target_modules, str):
        names = [n for n in linear if re.fullmatch(target_modules, n)]
    else:
        for target in target_modules:
            if not any(_is_or_ends_with(n, target) for n in linear):
                ends = sorted({n.rsplit(".", 1)[-1] for n in linear})
                raise ConfigError(
                    f"adapter.target_modules: {target!r} matches no linear layer"
                    f"{nearest(target, ends)}; there are {ends}"
                )
        names = [n for n in linear if any(_is_or_ends_with(n, t) for t in target_modules)]
    if not names:
        ends = sorted({n.rsplit(".", 1)[-1] for n in linear})
        raise ConfigError(f"adapter.target_modules {target_modules!r} matches no layer of {ends}")
    if outputs := [n for n in names if model.get_submodule(n) is head]:
        raise ConfigError(
            f"adapter.target_modules takes in the output layer {outputs[0]}, which TRL's losses and "
            "models with tied embeddings read without an adapter. Leave it out."
        )
    return {n: linear[n] for n in names}


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer in a forward pass.

    Attributes:
        tensor: Which tensor it read: identity and version, the same for layers that share an input.
        input_shape: Shape of its input; empty if that is no tensor.
        output_shape: Shape of its output; empty if that is no tensor.
    """

    tensor: tuple[int, int]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def trace_calls(model: nn.Module, names: Iterable[str], batch: Batch) -> dict[str, list[LayerCall]]:
    """Watch one forward pass: the calls of every named layer, in the order of the first call.

    Layers that are not called are missing.

    Args:
        model: The base model (a meta-device skeleton with a meta batch will do).
        names: Of the layers.
        batch: ``input_ids`` and ``attention_mask``, shape (batch, tokens); small is enough.
    """
    found: dict[str, list[LayerCall]] = {}
    alive: list[Any] = []  # keeps identities unique for the length of the pass

    def before(name: str, x: Any) -> None:
        alive.append(x)
        version = 0 if not isinstance(x, Tensor) or x.is_inference() else x._version
        found.setdefault(name, []).append(LayerCall((id(x), version), _shape(x), ()))

    def after(name: str, output: Any) -> None:
        found[name][-1] = replace(found[name][-1], output_shape=_shape(output))

    with layer_hooks(model, names, before, after), evaluating(model), torch.no_grad():
        model(**batch, **minimal_forward_options(model))
    return found


def group_by_input(
    seen: Mapping[str, Sequence[LayerCall]], layers: Mapping[str, tuple[int, int]]
) -> list[InputGroup]:
    """Put together the layers that read the same tensor in their first call.

    Args:
        seen: From `trace_calls`.
        layers: (d_in, d_out) of the layers that count, all of them in `seen`.
    """
    sharing: dict[tuple[int, int], list[str]] = {}
    for name, calls in seen.items():
        if name in layers:
            sharing.setdefault(calls[0].tensor, []).append(name)
    return [InputGroup(tuple(names), layers[names[0]][0]) for names in sharing.values()]


def find_groups(
    model: nn.Module, layers: dict[str, tuple[int, int]], batch: Batch
) -> list[InputGroup]:
    """Watch one forward pass and put together the layers that are handed the same tensor.

    Args:
        model: The base model (a meta-device skeleton with a meta batch will do).
        layers: From `target_layers`.
        batch: As in `trace_calls`.

    Raises:
        ConfigError: A layer is not reached by the forward pass.
    """
    seen = trace_calls(model, layers, batch)
    if missing := [name for name in layers if name not in seen]:
        raise ConfigError(
            f"{len(missing)} of the layers to adapt take no part in the forward pass, such as "
            f"{missing[0]}. Leave them out of adapter.target_modules."
        )
    return group_by_input(seen, layers)


@contextmanager
def layer_hooks(
    model: nn.Module,
    names: Iterable[str],
    before: Callable[[str, Any], None],
    after: Callable[[str, Any], None] | None = None,
) -> Iterator[None]:
    """Call `before(name, input)` before each named layer runs and `after(name, output)` after it.

    No hook outlives the block.
    """
    handles = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    def hook_behind(name: str, see: Callable[[str, Any], None]) -> Callable[..., None]:
        return lambda module, args, output: see(name, output)

    try:
        for name in names:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(hook_for(name), with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(hook_behind(name, after)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def minimal_forward_options(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of a forward pass that reads layers' inputs alone: no cache, and no logits.

    With a large vocabulary logits are a good part of the pass.
    """
    known = inspect.signature(model.forward).parameters
    generates = isinstance(model, PreTrainedModel) and model.can_generate()
    found: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    return found | ({"use_cache": False} if generates or "use_cache" in known else {})


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is_or_ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
