"""The start token and the end tokens of sampled sequences."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folora.errors import DataError
from folora.runtime.fingerprints import tokenizer_fingerprint

logger = logging.getLogger(__name__)

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")  # of GPT-2 and Qwen, and of Llama 3


def start_token_id(tokenizer: PreTrainedTokenizerBase, choice: str | None, *configs: Any) -> int:
    """The token that sampling starts from.

    Args:
        tokenizer: The model's tokenizer.
        choice: None for the tokenizer's BOS, ``"eos"``, or the text of a token.
        configs: The model config and the generation config. If the tokenizer has no BOS, theirs is used,
            then the token that separates documents; the log names it.

    Raises:
        DataError: The chosen token does not exist, or none was chosen and there is no default.
    """
    if choice is None:
        if tokenizer.bos_token_id is not None:
            return int(tokenizer.bos_token_id)
        return _document_start(tokenizer, configs)
    if choice == "eos":
        if tokenizer.eos_token_id is None:
            raise DataError("sampling.start_token is 'eos', but this tokenizer has no EOS token")
        return int(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    if choice not in vocabulary:
        raise DataError(f"sampling.start_token {choice!r} is not a token of this tokenizer")
    return int(vocabulary[choice])


def _document_start(tokenizer: PreTrainedTokenizerBase, configs: Sequence[Any]) -> int:
    """The token at the start of documents, for a tokenizer without BOS. Raises DataError."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
    for number, why in _candidates(tokenizer, configs):
        if number in special:  # the default id of a config class may be an ordinary token here
            logger.info(
                "sampling starts from %r (token %d), %s; the tokenizer has no BOS token",
                tokenizer.convert_ids_to_tokens(number), number, why,
            )  # fmt: skip
            return number
    eos = f"eos (which is {tokenizer.eos_token!r})" if tokenizer.eos_token else "TOKEN"
    raise DataError(
        "this tokenizer has no BOS token to start sampling from, and neither the model's config nor a "
        f"document separator provides one. Choose one with --sampling.start_token {eos}, or with the "
        "text of a token that began documents in pretraining."
    )


def _candidates(
    tokenizer: PreTrainedTokenizerBase, configs: Sequence[Any]
) -> Iterator[tuple[Any, str]]:
    for config in configs:
        for part in (config, getattr(config, "get_text_config", lambda: None)()):
            found = getattr(part, "bos_token_id", None)
            yield (found if isinstance(found, int) else None), "bos_token_id of the model's config"
    vocabulary = tokenizer.get_vocab()
    for separator in SEPARATORS:
        yield vocabulary.get(separator), "which separates documents"
    template = str(tokenizer.chat_template or "")
    ends_turns = "eos_token" in template or (tokenizer.eos_token or "") in template
    if not template or not ends_turns:
        yield tokenizer.eos_token_id, "which ends documents"


def ending_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, more: Sequence[int] = ()
) -> list[int]:
    """The tokens that end a sampled sequence, from the model's generation config or the tokenizer, and `more`.

    Raises:
        DataError: One is outside the model's vocabulary.
    """
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    ids = [] if found is None else found if isinstance(found, list | tuple) else [found]
    known = known_tokens(model)
    if wrong := [i for i in ids if not 0 <= i < known]:
        raise DataError(
            f"the model's generation config ends sequences at token {wrong[0]}, but the model has "
            f"{known} tokens; correct eos_token_id there"
        )
    return [*dict.fromkeys(int(i) for i in (*ids, *more))]


def known_tokens(model: PreTrainedModel) -> int:
    """Number of token embeddings of the model."""
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]


def check_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str
) -> None:
    """Refuse a sampler model whose tokenizer has other token ids. Raises DataError."""
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other):
        raise DataError(
            f"the sampler model {name} has another tokenizer than the model ({len(other)} against "
            f"{len(tokenizer)} tokens, or other ids), so its token ids differ. "
            "Choose a sampler of the same family, or unset sampling.sampler_model."
        )
