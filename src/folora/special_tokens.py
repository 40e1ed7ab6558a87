"""The tokens that a sampled sequence starts from and ends with."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folora.config import SamplingConfig
from folora.errors import DataError
from folora.fingerprints import tokenizer_fingerprint


def start_token_id(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> int:
    """The token that sampling starts from.

    Args:
        tokenizer: Of the model.
        choice: None for the tokenizer's BOS, ``"eos"``, or the text of a token.

    Raises:
        DataError: The tokenizer has no BOS and nothing was chosen, or the token does not exist.
    """
    if choice is None:
        if tokenizer.bos_token_id is None:
            raise DataError(
                "this tokenizer has no BOS token to start sampling from. Choose one: "
                f"--sampling.start_token eos (which is {tokenizer.eos_token!r}), or the text of a "
                "token that stood at the start of documents in pretraining."
            )
        return int(tokenizer.bos_token_id)
    if choice == "eos":
        if tokenizer.eos_token_id is None:
            raise DataError("sampling.start_token is 'eos', but this tokenizer has no EOS token")
        return int(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    if choice not in vocabulary:
        raise DataError(f"sampling.start_token {choice!r} is not a token of this tokenizer")
    return int(vocabulary[choice])


def ending_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig
) -> list[int]:
    """The tokens that end a sampled sequence: none if EOS is to be ignored.

    Raises:
        DataError: The model has no logit for one of them.
    """
    found = [] if config.ignore_eos else eos_token_ids(model, tokenizer)
    known = known_tokens(model)
    if wrong := [i for i in found if not 0 <= i < known]:
        raise DataError(
            f"the model's generation config ends sequences at token {wrong[0]}, but the model knows "
            f"{known} tokens; correct eos_token_id there, or give --sampling.ignore_eos true"
        )
    return found


def known_tokens(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings for."""
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a sequence, by the model's generation config or the tokenizer."""
    generation = getattr(model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return []
    return [int(i) for i in found] if isinstance(found, list | tuple) else [int(found)]


def check_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str
) -> None:
    """Refuse a sampler model whose tokenizer gives other ids. Raises DataError."""
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other):
        raise DataError(
            f"the sampler model {name} has another tokenizer than the model ({len(other)} against "
            f"{len(tokenizer)} tokens, or other ids), so its tokens mean nothing to the model. "
            "Choose a sampler of the same family, or leave sampling.sampler_model out."
        )
