"""The stages from a model and a dataset to an adapter, in memory (`prepare`) and in a folder (`Run`).

May import all but `compare` and `cli`.
"""
