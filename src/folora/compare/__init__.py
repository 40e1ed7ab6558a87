"""Compare methods on the same samples and moments: sweeps, frontiers, tables and plots. Extra: compare.

May import all but `cli`; nothing but `cli` imports it.
"""
