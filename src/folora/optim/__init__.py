"""SAdam: Adam whose steps are taken and gated in an eigenbasis (Eq. 18-24).

May import `folora.runtime.tensors` alone.
"""
