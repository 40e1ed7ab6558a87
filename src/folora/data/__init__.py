"""Data: turn users' rows into token ids and labels (files, formats, chat templates, special tokens).

May import `runtime`.
"""
