"""Other methods on the same samples and statistics: sweeps, frontiers, tables and plots. Extra: compare.

May import all but `cli`; nothing but `cli` imports it.
"""
