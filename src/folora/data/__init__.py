"""From a user's rows to token ids and labels: files, formats, chat templates, special tokens.

May import `runtime`.
"""
