"""Which layers are adapted, and which of them read the same tensor.

Layers that read the same tensor (q, k and v; gate and up) share one covariance. They are found by watching
one forward pass: two layers belong together if they receive the same tensor object, unchanged in between.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
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
    """(d_in, d_out) of a linear layer (nn.Linear, quantized linear, GPT-2's Conv1D), or None."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Linear):  # includes bitsandbytes and torchao layers
        return module.in_features, module.out_features
    if hasattr(module, "qweight") and hasattr(module, "in_features"):  # GPTQ, AWQ
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return None


def target_layers(
    model: nn.Module, target_modules: str | Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Names of the linear layers to adapt, with (d_in, d_out), in the order of the model.

    Args:
        model: The base model, or one without weights on the meta device.
        target_modules: As in PEFT: ``"all-linear"`` (all but the output layer), a list of names, each
            of which matches a layer's full name or its end after a dot, or a regular expression that
            matches the full name.

    Raises:
        ConfigError: Nothing matches, a name matches no linear layer, or the output layer is included.
    """
    linear = {n: dims for n, m in model.named_modules() if (dims := linear_dims(m)) is not None}
    if not linear:
        raise ConfigError(f"{type(model).__name__} has no linear layers to adapt")
    ends = sorted({n.rsplit(".", 1)[-1] for n in linear})
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if target_modules == "all-linear":
        names = [n for n in linear if model.get_submodule(n) is not head]
    elif isinstance(target_modules, str):
        names = [n for n in linear if re.fullmatch(target_modules, n)]
    else:
        matches = {t: [n for n in linear if f".{n}".endswith(f".{t}")] for t in target_modules}
        if unknown := [t for t, found in matches.items() if not found]:
            raise ConfigError(
                f"adapter.target_modules: {unknown[0]!r} matches no linear layer"
                f"{nearest(unknown[0], ends)}; there are {ends}"
            )
        names = [n for n in linear if any(n in found for found in matches.values())]
    if not names:
        raise ConfigError(f"adapter.target_modules {target_modules!r} matches no layer of {ends}")
    if outputs := [n for n in names if model.get_submodule(n) is head]:
        raise ConfigError(
            f"adapter.target_modules includes the output layer {outputs[0]}, whose weights TRL's losses "
            "and tied embeddings use without the adapter. Leave it out."
        )
    return {n: linear[n] for n in names}


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer in a forward pass.

    Attributes:
        tensor: Identity and version of its input tensor, equal for layers that share an input.
        input_shape: Shape of its input; empty if that is no tensor.
        output_shape: Shape of its output; empty if that is no tensor.
    """

    tensor: tuple[int, int]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def trace_calls(model: nn.Module, names: Iterable[str], batch: Batch) -> dict[str, list[LayerCall]]:
    """Record the calls of the named layers in one forward pass, in the order of the first calls.

    Layers that are not called are missing from the result. A small batch is enough, and model and batch may be
    on the meta device.
    """
    found: dict[str, list[LayerCall]] = {}
    alive: list[Any] = []  # keeps ids unique during the pass

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
    """Group the layers whose first call has the same input tensor; all must be in `seen`, from `trace_calls`."""
    sharing: dict[tuple[int, int], list[str]] = {}
    for name, calls in seen.items():
        if name in layers:
            sharing.setdefault(calls[0].tensor, []).append(name)
    return [InputGroup(tuple(names), layers[names[0]][0]) for names in sharing.values()]


def find_groups(
    model: nn.Module, layers: dict[str, tuple[int, int]], batch: Batch
) -> list[InputGroup]:
    """Run one forward pass and group the layers from `target_layers` with the same input tensor.

    Raises:
        ConfigError: The forward pass does not call a layer.
    """
    seen = trace_calls(model, layers, batch)
    if missing := [name for name in layers if name not in seen]:
        raise ConfigError(
            f"{len(missing)} of the layers to adapt are not called in the forward pass, such as "
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
    """Call `before(name, input)` before each named layer runs and `after(name, output)` after it."""

    def pre_hook(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before(name, args[0] if args else next(iter(kwargs.values())))

    def post_hook(
        call: Callable[[str, Any], None], name: str, _: nn.Module, __: Any, output: Any
    ) -> None:
        call(name, output)

    with ExitStack() as handles:
        for name in names:
            module = model.get_submodule(name)
            pre = module.register_forward_pre_hook(partial(pre_hook, name), with_kwargs=True)
            handles.enter_context(pre)
            if after is not None:
                handles.enter_context(module.register_forward_hook(partial(post_hook, after, name)))
        yield


def minimal_forward_options(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that skip what layers' inputs do not need: the KV cache and all but the last logits."""
    known = inspect.signature(model.forward).parameters
    generates = isinstance(model, PreTrainedModel) and model.can_generate()
    found: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    return found | ({"use_cache": False} if generates or "use_cache" in known else {})


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()
