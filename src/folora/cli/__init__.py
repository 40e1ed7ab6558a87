"""The command line: options, commands and what they print.

May import everything.
"""
