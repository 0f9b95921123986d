"""Statistics of an atlas: time against class, what the channels receive, class geometry, drift between checkpoints."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from ..models.unet import Site
from ..schema import short_repr
from .atlas import Atlas, ModulationField, SiteAtlas

SILENCED = 0.01  # of the site's median |gain|
CONSTANT = 0.01  # of the same
SAME_MODULATION = 1e-6  # of the size of the modulation: a smaller distance is rounding
NETWORK_HALVES = {"down": "encoder", "middle": "middle", "up": "decoder"}


# ---------------------------------------------------------------------- one site


def gain_and_shift(site: SiteAtlas) -> tuple[np.ndarray, np.ndarray]:
    """The gain w (1 + gamma) and the shift b (1 + gamma) + beta of each channel, both [T, stored classes, channels].

    w, b: the norm's own weight and bias (1 and 0 where it has none). A field that the conditioning lacks counts as 0.
    The shift of additive conditioning comes before the norm and is not included. Raises InputError without gamma and
    beta.
    """
    gamma, beta = (site.fields[name].values if name in site.fields else None for name in ("gamma", "beta"))
    if gamma is None and beta is None:
        raise InputError(f"{site.site.name} has neither gamma nor beta, but {', '.join(site.fields)}.")
    gain = 1 + (gamma if gamma is not None else np.zeros_like(beta))
    w = 1.0 if site.weight is None else site.weight
    b = 0.0 if site.bias is None else site.bias
    return w * gain, b * gain + (beta if beta is not None else 0)


@dataclass(frozen=True)
class ChannelCounts:
    """How many channels of a site are unusual over the whole grid.

    Args:
        silenced: |gain| is below 1% of the site's median |gain| everywhere.
        flipped: The gain changes its sign.
        constant: Neither gain nor shift moves by more than 1% of the site's median |gain|.
        total: All channels.
    """

    silenced: int
    flipped: int
    constant: int
    total: int


def count_channels(site: SiteAtlas) -> ChannelCounts:
    gain, shift = (a.reshape(-1, a.shape[-1]) for a in gain_and_shift(site))
    typical = float(np.median(np.abs(gain))) or 1.0
    moves = np.maximum(np.ptp(gain, axis=0), np.ptp(shift, axis=0))
    return ChannelCounts(
        silenced=int((np.abs(gain).max(0) < SILENCED * typical).sum()),
        flipped=int(((gain.max(0) > 0) & (gain.min(0) < 0)).sum()),
        constant=int((moves < CONSTANT * typical).sum()),
        total=gain.shape[-1],
    )


# ---------------------------------------------------------------------- all sites


class Variance(NamedTuple):
    """Variance over the grid, summed over channels: due to time, to the class, and to their interaction."""

    time: float = 0.0
    label: float = 0.0
    interaction: float = 0.0

    @property
    def total(self) -> float:
        return self.time + self.label + self.interaction

    @property
    def classes(self) -> float:
        """Between the classes at one noise level, averaged over the noise levels."""
        return self.label + self.interaction

    @property
    def class_fraction(self) -> float | None:
        return self.classes / self.total if self.total else None

    @property
    def fractions(self) -> "Variance | None":
        """The same as fractions, which sum to 1. None where nothing varies."""
        return Variance(*(part / self.total for part in self)) if self.total else None

    def plus(self, other: "Variance") -> "Variance":
        return Variance(*(a + b for a, b in zip(self, other)))


def variance(f: ModulationField) -> Variance:
    return Variance(*(float(part.sum()) for part in (f.by_time, f.by_class, f.by_both)))


def variance_fractions(f: ModulationField) -> Variance | None:
    """The fractions of a field's variance over its grid, summed over its channels. None where nothing varies."""
    return variance(f).fractions


def variances(atlas: Atlas) -> dict[str, dict[str, Variance]]:
    """{field: {site name: its variance}}, for the sites that have the field."""
    by_field: dict[str, dict[str, Variance]] = {}
    for name, site in atlas.sites.items():
        for parameter, f in site.fields.items():
            by_field.setdefault(parameter, {})[name] = variance(f)
    return by_field


def sum_variances(parts: Iterable[Variance]) -> Variance:
    total = Variance()
    for v in parts:
        total = total.plus(v)
    return total


@dataclass(frozen=True)
class Place:
    """Sites at one place of the network.

    Args:
        name: Such as "8x8 in the decoder".
        sites: How many.
        channels: Their fraction of all channels.
        between: Their fraction of all between-class variance; nan where there is none.
        class_fraction: The class fraction of their own variance; None where nothing varies.
    """

    name: str
    sites: int
    channels: float
    between: float
    class_fraction: float | None


def by_place(sites: Sequence[tuple[Site, Variance]], place_of: Callable[[Site], str] | None = None) -> list[Place]:
    """The variances summed by place, in the order of depth. place_of: `describe_position`, or another name of a place."""
    groups: dict[str, list[tuple[Site, Variance]]] = {}
    for site, v in sites:
        groups.setdefault((place_of or describe_position)(site), []).append((site, v))
    channels, between = sum(s.channels for s, _ in sites), sum(v.classes for _, v in sites)
    return [
        Place(
            name,
            len(group),
            sum(s.channels for s, _ in group) / channels,
            sum(v.classes for _, v in group) / between if between else float("nan"),
            sum_variances(v for _, v in group).class_fraction,
        )
        for name, group in groups.items()
    ]


def main_field(atlas: Atlas) -> str:
    """The field that stands for a site where only one can: gamma, else the attended values, else the first."""
    fields = [name for site in atlas.sites.values() for name in site.fields]
    return next((name for name in ("gamma", "values") if name in fields), fields[0])


def real_class_indices(atlas: Atlas) -> list[int]:
    """Indices of the stored classes without null on the class axis."""
    return [index for index, c in enumerate(atlas.class_ids) if c != atlas.null_id or not atlas.num_classes]


def class_spread(atlas: Atlas, field: str) -> np.ndarray:
    """[sites with the field, T]: standard deviation over the stored classes at each noise level, RMS over channels."""
    real = real_class_indices(atlas)
    spreads = [_flat(f.values)[:, real].var(1, dtype=np.float64).mean(-1) for f in _fields(atlas, field)]
    return _without_rounding(np.sqrt(spreads), atlas, field)


def time_shift(atlas: Atlas, field: str) -> np.ndarray:
    """[sites with the field, T]: the mean over all classes minus its mean over time, RMS over channels."""
    means = [f.class_mean.reshape(len(f.class_mean), -1) for f in _fields(atlas, field)]
    return _without_rounding(np.sqrt([np.square(m - m.mean(0)).mean(-1) for m in means]), atlas, field)


def _without_rounding(spread: np.ndarray, atlas: Atlas, field: str) -> np.ndarray:
    """Below 1e-6 of the field's own size a difference is float32 rounding and becomes 0."""
    size = np.array([np.sqrt(f.mean_square.mean()) for f in _fields(atlas, field)])
    return np.where(spread > 1e-6 * size[:, None], spread, 0)


def sites_with(atlas: Atlas, field: str) -> list[SiteAtlas]:
    return [s for s in atlas.sites.values() if field in s.fields]


def _fields(atlas: Atlas, field: str) -> list[ModulationField]:
    return [s.fields[field] for s in sites_with(atlas, field)]


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(*values.shape[:2], -1)


# ---------------------------------------------------------------------- classes


@dataclass(frozen=True)
class ClassGeometry:
    """Cosines and distances between the stored classes.

    A class is one vector: the modulation of all sites, averaged over time.

    Args:
        names: Names of the real classes.
        cosine: [K, K], between the deviations from the class mean.
        distance: [K, K], Euclidean; 0 where it is rounding.
        nearest: For each class the nearest other one.
        null_distance: Distance of the null label from the class mean, in units of the mean distance of a class from it.
            None without null, and where all classes have the same modulation.
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
            f.values.mean(0, dtype=np.float64).reshape(len(atlas.class_ids), -1)
            for s in atlas.sites.values()
            for f in s.fields.values()
        ],
        axis=1,
    )
    real = [i for i, c in enumerate(atlas.class_ids) if c != atlas.null_id]
    if atlas.num_classes < 2 or len(real) < 2:
        return None
    mean = vectors[real].mean(0)
    tiny = SAME_MODULATION * np.linalg.norm(vectors[real], axis=1).max()
    deviation = vectors[real] - mean
    deviation[np.linalg.norm(deviation, axis=1) <= tiny] = 0
    length = np.linalg.norm(deviation, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.nan_to_num(deviation @ deviation.T / np.outer(length, length))
    distance = np.stack([np.linalg.norm(deviation - one, axis=1) for one in deviation])
    distance[distance <= tiny] = 0
    others = distance + np.where(np.eye(len(real), dtype=bool), np.inf, 0)
    names = [atlas.classes[i] for i in real]
    null = None
    if atlas.null_id is not None and length.mean() > 0:
        null = float(np.linalg.norm(vectors[atlas.class_ids.index(atlas.null_id)] - mean) / length.mean())
    return ClassGeometry(names, cosine, distance, [names[i] for i in others.argmin(1)], null)


# ---------------------------------------------------------------------- two checkpoints


def drift(before: Atlas, after: Atlas) -> Mapping[str, dict[str, float]]:
    """How far each field of each site moved between two checkpoints, {site: {field: ratio}}.

    ratio: RMS of the difference over RMS of the earlier values; inf where only the earlier values are all 0.
    Raises InputError for atlases of different sites, timesteps or classes.
    """
    first, second = (
        {
            "conditioning": atlas.conditioning,
            "classes": atlas.classes,
            "process": atlas.process,
            "timesteps": [float(t) for t in atlas.timesteps],
            "sites": {name: [f.values.shape for f in site.fields.values()] for name, site in atlas.sites.items()},
        }
        for atlas in (before, after)
    )
    if differing := [what for what in first if first[what] != second[what]]:
        what = differing[0]
        raise InputError(
            f"the atlases differ in {what} ({short_repr(first[what])} and {short_repr(second[what])}): trace both with the same settings."
        )
    moved: dict[str, dict[str, float]] = {}
    for name, site in before.sites.items():
        moved[name] = {}
        for parameter, f in site.fields.items():
            a, b = f.values.astype(np.float64), after.sites[name].fields[parameter].values.astype(np.float64)
            base = np.sqrt(np.square(a).mean())
            moved[name][parameter] = (
                float(np.sqrt(np.square(b - a).mean()) / base) if base > 0 else (np.inf if b.any() else 0.0)
            )
    return moved


# ---------------------------------------------------------------------- names of sites


def network_half(site: Site) -> str:
    """ "down", "middle" or "up"."""
    return site.name.split(".")[0]


def resolution_of(site: Site) -> str:
    """Such as "8x8"."""
    return f"{site.resolution}x{site.resolution}"


def describe_position(site: Site) -> str:
    """Such as "8x8 in the decoder"."""
    half = network_half(site)
    return f"{site.resolution}x{site.resolution} in the {NETWORK_HALVES.get(half, half)}"


def short_names(names: list[str]) -> dict[str, str]:
    """Short names of module paths: "up.1.stages.0.block.norm2" -> "up 1.0"; a block's two norms become "a" and "b"."""
    both = any(n.endswith(".norm1") for n in names)
    return {n: _short_name(n, both) for n in names}


def _short_name(name: str, both: bool) -> str:
    words = name.split(".")
    suffix = {"norm1": "a", "norm2": "b" if both else ""}.get(words[-1])
    if suffix is None or words[0] not in NETWORK_HALVES:
        return name
    inner = [w.replace("resample", "r") for w in words[1:-1] if w not in ("stages", "block")]
    return f"{words[0]} {'.'.join(inner)}{suffix}"
