"""Exact scores of prompt/completion rows, at one forward pass per batch.

Greedy decoding gives exactly the completion if and only if, with the right answer forced as
input, each completion token and the closing <eos> is the most likely next token; so nothing has
to be generated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from benchmarks.world.language import Row, World, skills
from folora.runtime.contexts import evaluating

IGNORED = -100


def _encode(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], int]:
    """The ids of ``<bos> prompt completion <eos>`` and where the completion begins."""
    prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"])["input_ids"]]
    completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    return prompt + completion, len(prompt)


def _collate(
    encoded: Sequence[tuple[list[int], int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded inputs, their attention mask, and labels on the completions only."""
    width = max(len(ids) for ids, _ in encoded)
    inputs = torch.full((len(encoded), width), pad)
    mask = torch.zeros_like(inputs)
    labels = torch.full_like(inputs, IGNORED)
    for i, (ids, start) in enumerate(encoded):
        inputs[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = 1
        labels[i, start : len(ids)] = inputs[i, start : len(ids)]
    return inputs.to(device), mask.to(device), labels.to(device)


def _score_batch(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """How many rows are exactly right, and the summed log-probability of all rows."""
    inputs, mask, labels = batch
    logits = model(input_ids=inputs, attention_mask=mask).logits[:, :-1].float()
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    right = ((logits.argmax(-1) == targets) | ~wanted).all(dim=1)
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return right.sum().item(), chosen[wanted].double().sum().item()


@torch.inference_mode()
def score_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int = 256,
) -> tuple[float, float]:
    """Exact-match accuracy, and the mean over rows of log p(completion <eos> | <bos> prompt)."""
    if not rows:
        raise ValueError("no rows to score")
    device = next(model.parameters()).device
    encoded = [_encode(tokenizer, row) for row in rows]
    right = total = 0.0
    with evaluating(model):
        for start in range(0, len(encoded), batch_size):
            batch = _collate(encoded[start : start + batch_size], tokenizer.pad_token_id, device)
            batch_right, batch_total = _score_batch(model, batch)
            right, total = right + batch_right, total + batch_total
    return right / len(rows), total / len(rows)


def score_skills(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, world: World, every: int = 1
) -> dict[str, float]:
    """The accuracy of each pretraining skill, on a subset of its probes."""
    return {
        name: score_rows(model, tokenizer, rows[::every])[0] for name, rows in skills(world).items()
    }
