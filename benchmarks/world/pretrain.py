"""Pretrain a small LLaMA-style model on a world: ``python -m benchmarks.world.pretrain``.

Documents are packed as ``<bos> doc <eos> <bos> doc <eos> ...`` and every sequence starts at a
<bos>, so that <bos> alone prompts the trained model for the mixture it was trained on. The same
seed gives the same weights on the same machine with one thread.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.world.language import World, pretraining_documents
from benchmarks.world.score import score_skills
from benchmarks.world.tokenizer import build_tokenizer
from folora.runtime.storage import write_atomically

STEPS = 2000
BATCH = 8
LENGTH = 128
PEAK_RATE = 3e-3
WARM_UP_SHARE = 0.05
FINAL_RATE_SHARE = 0.02
REPORT_EVERY = 100


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """About a million parameters: five minutes on one thread teach it every skill."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def packed_sequences(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerFast, length: int
) -> Iterator[list[int]]:
    """Sequences of exactly ``length`` ids; a document cut by the end is not continued."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    while True:
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer(f"{bos}{next(documents)}{eos}")["input_ids"]
        yield ids[:length]


def rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Weight decay on matrices only: the norms' gains have no reason to shrink."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, inputs: Tensor, rate: float
) -> float:
    """One update at a share of the peak rate; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = PEAK_RATE * rate
    loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.item())


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World, steps: int
) -> float:
    """Train in place; returns the mean loss of the last steps."""
    documents = pretraining_documents(world, world.rng("pretraining"))
    sequences = packed_sequences(documents, tokenizer, LENGTH)
    optimizer = build_optimizer(model)
    model.train()
    losses: list[float] = []
    begun = time.monotonic()
    for step in range(steps):
        inputs = torch.tensor([next(sequences) for _ in range(BATCH)])
        losses.append(train_step(model, optimizer, inputs, rate_at(step, steps)))
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            left = (time.monotonic() - begun) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  loss {losses[-1]:.4f}  {left:.0f} s left", flush=True)
    recent = losses[-REPORT_EVERY:]
    return sum(recent) / len(recent)


def pretrain(output: Path, seed: int, steps: int = STEPS) -> dict[str, object]:
    """Pretrain on ``World(seed)``, save to ``output`` and return what ``world.json`` holds."""
    if output.exists():
        raise FileExistsError(f"{output} exists already")
    world, tokenizer = World(seed), build_tokenizer()
    # Without a fork the caller's random state would depend on whether it pretrained.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(model_config(tokenizer))
        loss = train(model, tokenizer, world, steps)
    facts: dict[str, object] = {
        "seed": seed,
        "steps": steps,
        "final_loss": loss,
        "skills": score_skills(model, tokenizer, world),
    }
    save(output, model, tokenizer, facts)
    return facts


def save(
    output: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    facts: dict[str, object],
) -> None:
    """Write beside ``output`` and rename, so that what stands there is always whole."""

    def write(partial: Path) -> None:
        partial.mkdir()
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "world.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    write_atomically(output, write)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pretrain a small model on a synthetic world.")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--seed", type=int, required=True, help="seed of the world and the weights")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1, help="one keeps a run reproducible")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    begun = time.monotonic()
    facts = pretrain(arguments.output, arguments.seed, arguments.steps)
    print(json.dumps(facts, indent=2))
    print(f"{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
