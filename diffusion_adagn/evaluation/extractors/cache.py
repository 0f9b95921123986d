"""The folder of cached classifiers: safetensors and JSON, written to a temporary folder and renamed."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...atomic import cache_root
from ...errors import InputError

if TYPE_CHECKING:
    from ...data import ImageDataset


def folder_for(dataset: ImageDataset, *recipe: str | int) -> Path:
    """Where the result of this recipe on these images is cached: next to the decoded images, in
    DIFFUSION_ADAGN_CACHE or ~/.cache/diffusion_adagn. The same images in another place have the same folder."""
    key_parts = [dataset.fingerprint, dataset.label_space.names, dataset.image_size, dataset.channels, *recipe]
    key = hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()[:16]
    return cache_root() / "judges" / key


def save(folder: Path, weights: Mapping[str, np.ndarray], facts: dict) -> None:
    """Write both atomically. If two processes finish at once, the last one wins."""
    from safetensors.numpy import save_file

    tmp = _temporary(folder)
    try:
        tmp.mkdir(parents=True)
        save_file(dict(weights), tmp / "weights.safetensors")
        (tmp / "judge.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        _move(tmp, folder)
    except OSError as error:
        raise InputError(f"the classifier cannot be saved in {folder}: {error}. Set DIFFUSION_ADAGN_CACHE.") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def read(folder: Path) -> tuple[dict[str, np.ndarray], dict] | None:
    """(weights, facts) of `folder`; None if it is missing or corrupted."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        facts = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
        return (load_file(folder / "weights.safetensors"), facts) if isinstance(facts, dict) else None
    except (OSError, ValueError, SafetensorError):
        return None


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")


def _move(tmp: Path, folder: Path) -> None:
    while True:
        try:
            tmp.rename(folder)
            return
        except OSError:
            if not folder.is_dir():
                raise
        old = _temporary(folder)
        try:
            folder.rename(old)
        except FileNotFoundError:  # another process has just moved it away
            continue
        shutil.rmtree(old, ignore_errors=True)
