"""The operator that the project is named after, fused: normalise, modulate and SiLU in one pass over memory."""

from .adagn_silu import OPERATORS, adagn_silu, available, in_functional_transform, unsupported_reason
from .reference import adagn_silu_reference

__all__ = [
    "OPERATORS",
    "adagn_silu",
    "adagn_silu_reference",
    "available",
    "in_functional_transform",
    "unsupported_reason",
]
