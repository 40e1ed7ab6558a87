"""A corpus of wrong inputs: the input, the required error message, and how early it is raised.

Every case is a command line (added to one that works, see `test_wrong_inputs`) with the files it needs.
``HERE`` in arguments and messages is the folder that these files are written to.
"""

from support.wrong_inputs.cases import Found, Wrong
from support.wrong_inputs.datasets import CHATS, DATA
from support.wrong_inputs.models import MODELS, TOKENIZERS
from support.wrong_inputs.options import COMMANDS, FILES, VALUES
from support.wrong_inputs.outputs import OTHERS, OUTPUTS

__all__ = ["KINDS", "Found", "Wrong"]

KINDS = {
    "command line": COMMANDS,
    "value": VALUES,
    "config file": FILES,
    "data": DATA,
    "chat": CHATS,
    "model": MODELS,
    "tokenizer": TOKENIZERS,
    "output": OUTPUTS,
    "other": OTHERS,
}
