"""SAdam, Adam with gated updates in an eigenbasis (Eq. 18-24): `sadam` is the reference, `fused` the fast path.

`folora.SAdam` is `fused.FusedSAdam`. May import torch and `folora.runtime.tensors` alone.
"""
