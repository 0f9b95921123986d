"""The numbers that the report draws and speaks of, taken from an atlas."""

from typing import NamedTuple

import numpy as np

from ..models.unet import Site
from .atlas import Atlas, Field, SiteAtlas

NETWORK_HALVES = {"down": "encoder", "middle": "middle", "up": "decoder"}


class Variance(NamedTuple):
    """Variance of what is told, over the grid and summed over channels: due to time, to the class, to both together."""

    time: float = 0.0
    label: float = 0.0
    both: float = 0.0

    @property
    def total(self) -> float:
        return self.time + self.label + self.both

    @property
    def classes(self) -> float:
        """Between the classes at one timestep, averaged over the timesteps."""
        return self.label + self.both

    @property
    def class_share(self) -> float | None:
        return self.classes / self.total if self.total else None

    def plus(self, other: "Variance") -> "Variance":
        return Variance(*(a + b for a, b in zip(self, other)))


def variance(f: Field) -> Variance:
    return Variance(*(float(part.sum()) for part in (f.by_time, f.by_class, f.by_both)))


def variances(atlas: Atlas) -> dict[str, dict[str, Variance]]:
    """{field: {site name: its variance}}, for the sites that have the field."""
    found: dict[str, dict[str, Variance]] = {}
    for name, site in atlas.sites.items():
        for what, f in site.fields.items():
            found.setdefault(what, {})[name] = variance(f)
    return found


def summed(some) -> Variance:
    total = Variance()
    for v in some:
        total = total.plus(v)
    return total


def main_field(atlas: Atlas) -> str:
    """The field that stands for a site where one must: gamma, else the attended values, else the first."""
    fields = [what for site in atlas.sites.values() for what in site.fields]
    return next((what for what in ("gamma", "values") if what in fields), fields[0])


def real_classes(atlas: Atlas) -> list[int]:
    """Places of the kept classes without null."""
    return [place for place, c in enumerate(atlas.kept_ids) if c != atlas.null_id or not atlas.num_classes]


def class_spread(atlas: Atlas, field: str) -> np.ndarray:
    """[sites with the field, T]: RMS over channels of the standard deviation over the kept classes at each timestep."""
    real = real_classes(atlas)
    spreads = [_flat(f.values)[:, real].var(1, dtype=np.float64).mean(-1) for f in _having(atlas, field)]
    return _without_rounding(np.sqrt(spreads), atlas, field)


def time_move(atlas: Atlas, field: str) -> np.ndarray:
    """[sites with the field, T]: RMS over channels of how far the mean over all classes stands from its mean over time."""
    means = [f.class_mean.reshape(len(f.class_mean), -1) for f in _having(atlas, field)]
    return _without_rounding(np.sqrt([np.square(m - m.mean(0)).mean(-1) for m in means]), atlas, field)


def _without_rounding(spread: np.ndarray, atlas: Atlas, field: str) -> np.ndarray:
    """float32 rounding is no difference: below 1e-6 of the field's own size it is 0."""
    size = np.array([np.sqrt(f.mean_square.mean()) for f in _having(atlas, field)])
    return np.where(spread > 1e-6 * size[:, None], spread, 0)


def sites_with(atlas: Atlas, field: str) -> list[SiteAtlas]:
    return [s for s in atlas.sites.values() if field in s.fields]


def _having(atlas: Atlas, field: str) -> list[Field]:
    return [s.fields[field] for s in sites_with(atlas, field)]


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(*values.shape[:2], -1)


# ---------------------------------------------------------------------- names


def part(site: Site) -> str:
    """ "down", "middle" or "up"."""
    return site.name.split(".")[0]


def where(site: Site) -> str:
    """Such as "8x8 in the decoder"."""
    return f"{site.resolution}x{site.resolution} in the {NETWORK_HALVES.get(part(site), part(site))}"


def short_names(names: list[str]) -> dict[str, str]:
    """Module paths in few letters: "up.1.stages.0.block.norm2" -> "up 1.0"; a block's two norms become "a" and "b"."""
    both = any(n.endswith(".norm1") for n in names)
    return {n: _short(n, both) for n in names}


def _short(name: str, both: bool) -> str:
    words = name.split(".")
    ending = {"norm1": "a", "norm2": "b" if both else ""}.get(words[-1])
    if ending is None or words[0] not in NETWORK_HALVES:
        return name
    inner = [w.replace("resample", "r") for w in words[1:-1] if w not in ("stages", "block")]
    return f"{words[0]} {'.'.join(inner)}{ending}"
