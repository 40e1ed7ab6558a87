"""Peak activation memory of a training step, without weights and optimizer state, on the meta device.

The forward and backward pass runs on the meta device, and the bytes of every tensor are counted during its
lifetime. Attention would fall back to the unfused implementation, which saves (tokens x tokens) matrices; it
is replaced by one that saves what fused kernels save. The output layer and the loss are added by a formula,
since TRL computes them in tiles.
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

# Tokens and columns of TRL's tile of logits. Without Triton, several float32 copies of it are alive at the
# same time (measured).
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
    """Peak bytes of tensors in a step's forward and backward pass, without weights.

    Rows are assumed to be padded; transformers then repeats shared keys and values. Gradients of the
    adapter are included; KL penalties and autocast copies are not.

    Args:
        model: On the meta device, in the dtype of training, in training mode; see `adapter.outline`.
        rows: Rows per batch.
        tokens: Tokens per row.
        on_cpu: Whether training will run on the CPU.
        checkpointing: Whether gradient checkpointing is on.
        masked: Whether the model gets a 4D attention mask, as for a padded batch.
    """
    base: Any = model.get_base_model()
    if checkpointing:  # torch disables function modes during the backward pass
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _FusedAttention())}
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    mask = torch.zeros(rows, 1, tokens, tokens, dtype=base.dtype, device="meta")
    given = {"attention_mask": mask} if masked else {}
    padding = mask.numel() * (1 + mask.itemsize) * masked  # as booleans and as an additive mask
    tracker = AllocationTracker([*base.parameters(), *base.buffers(), ids, mask])
    with narrow_inputs(model), _FusedAttention(), tracker:
        hidden = base.base_model(input_ids=ids, **given, use_cache=False).last_hidden_state
        vocabulary = base.config.get_text_config().vocab_size
        in_loss = tracker.allocated() + loss_bytes(hidden, vocabulary, on_cpu)
        hidden.backward(torch.empty_like(hidden))
    return max(tracker.peak, in_loss) + padding


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of tensors that are created while it is active, until they are freed.

    Args:
        known: Tensors that are not counted.

    Attributes:
        peak: Largest number of bytes allocated so far.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._bytes = {StorageWeakRef(t.untyped_storage()): 0 for t in known}
        self._total = 0

    def allocated(self) -> int:
        """Bytes allocated now."""
        for freed in [ref for ref in self._bytes if ref.expired()]:
            self._total -= self._bytes.pop(freed)
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
        if self._total > self.peak:  # only then look for freed tensors
            self.peak = max(self.peak, self.allocated())
        return made


class _FusedAttention(TorchFunctionMode):
    """Replaces torch's scaled_dot_product_attention by `_Fused`."""

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
    """Output shapes and saved tensors of a fused attention kernel, without values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, tokens, _ = query.shape
        # The memory layout is (rows, tokens, heads, features).
        out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(rows, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def loss_bytes(hidden: Tensor, vocabulary: int, on_cpu: bool) -> int:
    """Bytes of TRL's loss in its backward pass: a tile of logits, and the gradient of the hidden states."""
    tile = min(hidden[..., 0].numel(), TILE[0]) * min(vocabulary, TILE[1])
    size = hidden.dtype.itemsize
    return tile * (size + 4 * FLOAT32_TILES * on_cpu) + hidden.numel() * (4 + size)
