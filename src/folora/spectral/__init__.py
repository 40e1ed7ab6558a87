"""The generalized eigenproblem C_task v = gamma H v, for one layer input and for all of them (Eq. 10-15).

May import `runtime`.
"""
