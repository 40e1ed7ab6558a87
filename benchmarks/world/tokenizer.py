"""A character-level tokenizer over the alphabet of the world.

Every character is one token, so a prompt and its completion can be tokenized apart or together
with the same result. It adds no special tokens: who builds a sequence writes them itself.
"""

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from benchmarks.world.language import ALPHABET

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every world: the alphabet does not depend on the seed.

    There is no unknown token; a character outside the alphabet raises instead of vanishing.
    """
    symbols = (PAD, BOS, EOS, *ALPHABET)
    backend = Tokenizer(WordLevel({symbol: index for index, symbol in enumerate(symbols)}))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
