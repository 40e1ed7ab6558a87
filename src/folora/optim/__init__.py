"""SAdam, Adam gated in an eigenbasis (Eq. 18-24): `sadam` to read and copy, `fused` to train with.

`folora.SAdam` is `fused.FusedSAdam`. May import torch and `folora.runtime.tensors` alone.
"""
