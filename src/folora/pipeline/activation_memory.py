"""What a training step holds at most beside weights and optimizer, counted on a model without weights.

The step's forward and backward pass runs on the meta device, where tensors have sizes and no memory, and
every tensor's bytes count from its making to its end. Attention there would take its plain form, which
keeps (tokens x tokens); it is replaced by one that keeps what fused kernels keep. The head is left out and
added by a formula, since TRL's loss goes through it in tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from folora.adapters.low_rank import narrow_inputs

# TRL's tile of logits: tokens, and width. In torch's own operations, without Triton, some copies of it
# in float32 are alive at once; measured.
TILE, FLOAT32_TILES = (4096, 32768), 7


def step_bytes(
    model: PeftModel,
    rows: int,
    tokens: int,
    *,
    on_cpu: bool,
    checkpointing: bool = False,
    masked: bool = True,
) -> int:
    """Most bytes that are alive in a step's forward and backward pass, weights left out.

    Rows are taken to be padded, for which transformers repeats shared keys and values. Gradients of
    the adapter are in it; penalties (KL, Mask-the-Target) and what autocast casts are not.

    Args:
        model: On the meta device, in the dtype of training, in training mode; see `adapter.outline`.
        rows: Of a batch.
        tokens: Of a row.
        on_cpu: Whether the step will be taken there.
        checkpointing: Whether blocks keep their inputs alone and are run again in the backward pass.
        masked: Whether the model is handed a ready-made mask, as in a padded batch.
    """
    base: Any = model.get_base_model()
    if checkpointing:  # torch takes function modes away for the length of a backward pass
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _FusedAttention())}
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    mask = torch.zeros(rows, 1, tokens, tokens, dtype=base.dtype, device="meta")
    given = {"attention_mask": mask} if masked else {}
    padding = mask.numel() * (1 + mask.itemsize) * masked  # as booleans, and as what a kernel adds
    alive = Alive([*base.parameters(), *base.buffers(), ids, mask])
    with narrow_inputs(model), _FusedAttention(), alive:
        hidden = base.base_model(input_ids=ids, **given, use_cache=False).last_hidden_state
        in_loss = alive.now() + loss_bytes(hidden, base.config.get_text_config().vocab_size, on_cpu)
        hidden.backward(torch.empty_like(hidden))
    return max(alive.most, in_loss) + padding


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered, until they end.

    Args:
        known: Tensors that do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.most = 0
        self._bytes = {StorageWeakRef(t.untyped_storage()): 0 for t in known}
        self._total = 0

    def now(self) -> int:
        """Bytes that are alive."""
        for ended in [ref for ref in self._bytes if ref.expired()]:
            self._total -= self._bytes.pop(ended)
        return self._total

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `TorchDispatchMode`."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if (ref := StorageWeakRef(storage)) not in self._bytes:
                    self._bytes[ref] = storage.nbytes()
                    self._total += storage.nbytes()
        if self._total > self.most:  # who has ended since is only then of interest
            self.most = max(self.most, self.now())
        return made


class _FusedAttention(TorchFunctionMode):
    """Puts `_Fused` in the place of torch's attention."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is scaled_dot_product_attention:
            return _Fused.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """The shapes of attention by a fused kernel, and what that keeps; no values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, tokens, _ = query.shape
        # In memory heads lie inside of tokens.
        out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(rows, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def loss_bytes(hidden: Tensor, vocabulary: int, on_cpu: bool) -> int:
    """Of TRL's loss in its backward pass: a tile of logits, and the gradient of what the head reads."""
    tile = min(hidden[..., 0].numel(), TILE[0]) * min(vocabulary, TILE[1])
    size = hidden.dtype.itemsize
    return tile * (size + 4 * FLOAT32_TILES * on_cpu) + hidden.numel() * (4 + size)
