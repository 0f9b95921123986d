"""Reading an atlas: who is listened to, what it does to channels, how the classes lie, how two checkpoints differ."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .atlas import Atlas, Field, SiteAtlas

SILENT = 0.01  # of the site's median |gain|
STILL = 0.01  # of the same
SAME_MODULATION = 1e-6  # of the size of what is told: below, a distance is rounding


@dataclass(frozen=True)
class Shares:
    """Of the variance of what a site is told: the parts due to time, to the (real) class, and to both together; they sum to 1."""

    time: float
    label: float
    interaction: float


def shares(f: Field) -> Shares | None:
    """The parts of a field's variance over its grid (see `Field`), summed over its channels. None where nothing varies."""
    parts = [float(part.sum()) for part in (f.by_time, f.by_class, f.by_both)]
    return Shares(*(part / sum(parts) for part in parts)) if sum(parts) else None


def effective(site: SiteAtlas) -> tuple[np.ndarray, np.ndarray]:
    """The gain w (1 + gamma) and the shift b (1 + gamma) + beta that each channel really meets, [T, kept classes, channels].

    w, b: the norm's own weight and bias (1 and 0 where it has none). Fields that a kind does not have count as 0; additive's
    shift stands before the norm and is none of these. Raises InputError for a kind with neither gamma nor beta.
    """
    gamma, beta = (site.fields[name].values if name in site.fields else None for name in ("gamma", "beta"))
    if gamma is None and beta is None:
        raise InputError(f"{site.site.name} is told neither gamma nor beta, but {', '.join(site.fields)}.")
    gain = 1 + (gamma if gamma is not None else np.zeros_like(beta))
    w = 1.0 if site.weight is None else site.weight
    b = 0.0 if site.bias is None else site.bias
    return w * gain, b * gain + (beta if beta is not None else 0)


@dataclass(frozen=True)
class Channels:
    """How many channels of a site, over the whole grid: silenced: |gain| below 1% of the site's median |gain| everywhere.
    flipped: the gain's sign is the other one somewhere than elsewhere. constant: neither gain nor shift moves by more than 1% of the
    site's median |gain|. of: all channels."""

    silenced: int
    flipped: int
    constant: int
    of: int


def channels(site: SiteAtlas) -> Channels:
    gain, shift = (a.reshape(-1, a.shape[-1]) for a in effective(site))
    typical = float(np.median(np.abs(gain))) or 1.0
    moves = np.maximum(np.ptp(gain, axis=0), np.ptp(shift, axis=0))
    return Channels(
        silenced=int((np.abs(gain).max(0) < SILENT * typical).sum()),
        flipped=int(((gain.max(0) > 0) & (gain.min(0) < 0)).sum()),
        constant=int((moves < STILL * typical).sum()),
        of=gain.shape[-1],
    )


@dataclass(frozen=True)
class ClassGeometry:
    """How the kept classes lie in what all sites are told, averaged over time.

    names: of the real classes. cosine: [K, K] between their deviations from the class mean. distance: [K, K] Euclidean.
    nearest: for each class the nearest other one. null_distance: of null from the class mean, in units of the mean distance
    of a class from it (None without null, and where all classes are told the same). Distances that are rounding are 0.
    """

    names: list[str]
    cosine: np.ndarray
    distance: np.ndarray
    nearest: list[str]
    null_distance: float | None


def class_geometry(atlas: Atlas) -> ClassGeometry | None:
    """None with fewer than two real classes."""
    vectors = np.concatenate(
        [
            f.values.mean(0, dtype=np.float64).reshape(len(atlas.kept_ids), -1)
            for s in atlas.sites.values()
            for f in s.fields.values()
        ],
        axis=1,
    )
    real = [i for i, c in enumerate(atlas.kept_ids) if c != atlas.null_id]
    if atlas.num_classes < 2 or len(real) < 2:
        return None
    mean = vectors[real].mean(0)
    tiny = SAME_MODULATION * np.linalg.norm(vectors[real], axis=1).max()
    away = vectors[real] - mean
    away[np.linalg.norm(away, axis=1) <= tiny] = 0
    length = np.linalg.norm(away, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.nan_to_num(away @ away.T / np.outer(length, length))
    distance = np.stack([np.linalg.norm(away - one, axis=1) for one in away])
    distance[distance <= tiny] = 0
    others = distance + np.where(np.eye(len(real), dtype=bool), np.inf, 0)
    names = [atlas.classes[i] for i in real]
    null = None
    if atlas.null_id is not None and length.mean() > 0:
        null = float(np.linalg.norm(vectors[atlas.kept_ids.index(atlas.null_id)] - mean) / length.mean())
    return ClassGeometry(names, cosine, distance, [names[i] for i in others.argmin(1)], null)


def drift(before: Atlas, after: Atlas) -> Mapping[str, dict[str, float]]:
    """How far each field of each site moved between two checkpoints: RMS of the difference over RMS of the earlier, {site: {field: ratio}};
    inf where the earlier was 0 throughout and the later is not.

    Raises InputError for atlases of other sites, timesteps or classes.
    """
    for what in ("conditioning", "classes"):
        if getattr(before, what) != getattr(after, what):
            raise InputError(f"the atlases have other {what}: {getattr(before, what)} and {getattr(after, what)}.")
    if list(before.sites) != list(after.sites) or not np.array_equal(before.timesteps, after.timesteps):
        raise InputError("the atlases have other sites or timesteps: trace both with the same settings.")
    moved: dict[str, dict[str, float]] = {}
    for name, site in before.sites.items():
        moved[name] = {}
        for what, f in site.fields.items():
            a, b = f.values.astype(np.float64), after.sites[name].fields[what].values.astype(np.float64)
            if a.shape != b.shape:
                raise InputError(f"{name} has other channels in the two atlases.")
            base = np.sqrt(np.square(a).mean())
            moved[name][what] = (
                float(np.sqrt(np.square(b - a).mean()) / base) if base > 0 else (np.inf if b.any() else 0.0)
            )
    return moved
