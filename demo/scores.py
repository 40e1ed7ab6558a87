"""What a model has learned and what it still knows, each as one number, and how it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from demo.facts import load_facts, score_facts
from folora.data.contents import IGNORE, Example
from folora.data.rows import batches, text_examples
from folora.runtime.contexts import evaluating

ENGLISH = Path(__file__).with_name("english.txt")
"""Paragraphs of plain English, written for the demo."""
PROMPTS = ("What is the capital of France?", "Tell me a story about a dragon.")
NEW_TOKENS = 20


@dataclass(frozen=True)
class Scores:
    """Scores of one model.

    Attributes:
        task_loss: Cross-entropy in nats per response token on held-out questions.
        task_accuracy: Share of their queries that greedy decoding writes to the last token.
        facts_accuracy: Share of the facts whose right ending is the most likely of four.
        facts_log_probability: Mean log-probability of a fact's right ending.
        text_loss: Cross-entropy in nats per token on `ENGLISH`.
        kl: KL(base || adapted) in nats per token on held-out text of the base.
        answers: Its answers to `PROMPTS`.
    """

    task_loss: float
    task_accuracy: float
    facts_accuracy: float
    facts_log_probability: float
    text_loss: float
    kl: float
    answers: tuple[str, ...]


def score(model: Any, tokenizer: Any, task: Sequence[Example], kl: float) -> Scores:
    """All scores of one model, whose KL is known."""
    paragraphs = ENGLISH.read_text(encoding="utf-8").strip().split("\n\n")
    facts = score_facts(model, tokenizer, load_facts())
    with evaluating(model):
        return Scores(
            *loss_and_exact(model, task),
            facts.accuracy,
            facts.log_probability,
            loss_and_exact(model, text_examples(tokenizer(paragraphs)["input_ids"]))[0],
            kl,
            tuple(answer(model, tokenizer, prompt) for prompt in PROMPTS),
        )


@torch.inference_mode()
def loss_and_exact(model: Any, examples: Sequence[Example]) -> tuple[float, float]:
    """Cross-entropy in nats per labelled token, and share of examples with all of them the most likely.

    If every token of a response is the most likely one after those before it, greedy decoding writes it.
    """
    loss = tokens = exact = 0.0
    for batch in batches(examples, batch_size=16):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        ignored = labels == IGNORE
        loss += float(cross_entropy(logits.mT, labels, ignore_index=IGNORE, reduction="sum"))
        tokens += int((~ignored).sum())
        exact += int(((logits.argmax(-1) == labels) | ignored).all(-1).sum())
    return loss / tokens, exact / len(examples)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """The first `NEW_TOKENS` tokens of a chat model's answer by greedy decoding, on one line.

    "[end]" stands where the model ends its answer.
    """
    chat = [{"role": "user", "content": prompt}]
    batch = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(
        **batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    new = ids[0, batch["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return " ".join([*text.split(), *(["[end]"] if len(new) < NEW_TOKENS else [])])
