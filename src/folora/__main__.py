"""``python -m folora``: the command line."""

from folora.cli.main import entry

entry()
