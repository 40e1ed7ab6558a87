"""``python -m folora``: the command line."""

from folora.cli import entry

entry()
