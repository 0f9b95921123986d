"""The processes that share the work."""

from datetime import timedelta

import torch
from accelerate import PartialState


def all_processes() -> PartialState:
    """Those of torchrun or accelerate, or one alone. The others wait for hours while one decodes pictures or trains a judge."""
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return PartialState(cpu=cpu, timeout=timedelta(hours=12))
