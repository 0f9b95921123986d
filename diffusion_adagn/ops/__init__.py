"""The operator that the project is named after, fused: normalise, modulate and SiLU in one pass over memory."""

from .adagn_silu import OPERATORS, adagn_silu, available, transformed, why_not
from .reference import adagn_silu_reference

__all__ = ["OPERATORS", "adagn_silu", "adagn_silu_reference", "available", "transformed", "why_not"]
