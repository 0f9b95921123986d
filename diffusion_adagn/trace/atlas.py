"""The modulation atlas: what every site is told, over timesteps and classes. No picture is needed.

    atlas = Atlas.of(pipe.unet, pipe.labels)
    atlas.sites["up.1.stages.0.block.norm2"].fields["gamma"].values   # [timesteps, classes, channels]

Networks whose values would fill the memory are streamed: the statistics are over all classes, the values are kept for some.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import InputError
from ..labels import LabelSpace
from ..models.unet import AdaGNUNet, Site

MAX_CACHED = 64  # classes whose values are stored; the statistics are over all
ROWS = 256  # (timestep, class) pairs told at a time
ATLAS_PARTS = ("values", "class_mean", "by_time", "by_class", "by_both", "mean_square")


@dataclass
class Field:
    """One thing that a site is told, such as gamma, over a grid of T timesteps and K classes.

    values: float32 [T, kept classes, ...], the rest being channels, or tokens and channels.
    The others are float64 and over the K real classes, null left out. class_mean: [T, ...] mean over the classes.
    by_time, by_class, by_both: [...] parts of the variance over the grid, which add up to it:

        x[t, k] = mean + (mean over k - mean) + (mean over t - mean) + the rest

    (Fisher's two-way analysis of variance, one value a cell.) mean_square: [...] mean of x^2.
    """

    values: np.ndarray
    class_mean: np.ndarray
    by_time: np.ndarray
    by_class: np.ndarray
    by_both: np.ndarray
    mean_square: np.ndarray


@dataclass
class SiteAtlas:
    """A site, its norm's own weight and bias (None where it has none), and its fields by name."""

    site: Site
    weight: np.ndarray | None
    bias: np.ndarray | None
    fields: dict[str, Field]


@dataclass
class Atlas:
    """What every site is told.

    timesteps: [T] float64. classes: names of the kept classes, kept_ids their ids; the last may be "null". num_classes: K.
    sites: by name, in the order in which the picture meets them. model: where it comes from, for the record.
    """

    timesteps: np.ndarray
    classes: list[str]
    kept_ids: list[int]
    num_classes: int
    null_id: int | None
    conditioning: str
    sites: dict[str, SiteAtlas]
    model: dict = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        unet: AdaGNUNet,
        labels: LabelSpace,
        timesteps: Sequence[float] | int = 50,
        num_train_timesteps: int = 1000,
        keep: Sequence[int] | None = None,
        progress: bool = False,
    ) -> "Atlas":
        """Ask the network what it tells its sites.

        timesteps: the grid, or how many, evenly spread over 0..num_train_timesteps-1. keep: ids of the classes whose values are stored
        (None: all if there are at most 64, else the first 63); null is kept besides.
        """
        if isinstance(timesteps, int):
            timesteps = np.linspace(0, num_train_timesteps - 1, timesteps).round()
        grid = np.asarray(timesteps, dtype=np.float64)
        if grid.ndim != 1 or not len(grid) or not np.isfinite(grid).all() or grid.min() < 0:
            raise InputError(f"timesteps are a list of numbers of at least 0, not {timesteps!r}.")
        k, null = labels.K, labels.null_id if labels.K and labels.has_null else None
        keep = list(range(k if k <= MAX_CACHED else MAX_CACHED - 1)) if keep is None else list(dict.fromkeys(keep))
        if any(not 0 <= i < k for i in keep):
            raise InputError(f"classes to keep are ids of 0..{k - 1}, not {keep}.")
        ids = list(range(k)) + ([null] if null is not None else [])
        kept = keep + ([null] if null is not None else [])
        told = _Recorder(len(grid), k, {i: place for place, i in enumerate(kept)}, bool(k))
        device = unet.device
        pairs = [(a, i) for a in range(len(grid)) for i in (ids or [0])]
        was_training = unet.training
        unet.eval()
        try:
            for start in tqdm(
                range(0, len(pairs), ROWS), desc="atlas", unit="batch", disable=not progress, leave=False
            ):
                some = pairs[start : start + ROWS]
                t = torch.tensor([grid[a] for a, _ in some], dtype=torch.float32, device=device)
                y = torch.tensor([i for _, i in some], device=device) if k else None
                told.add(some, unet.modulation(t, y))
        finally:
            unet.train(was_training)
        sites = {}
        for site in unet.sites():
            norm = unet.get_submodule(site.name)
            own = [getattr(norm, name, None) for name in ("weight", "bias")]
            own = [None if p is None else p.detach().cpu().double().numpy() for p in own]
            sites[site.name] = SiteAtlas(site, *own, told.fields(site.name))
        return cls(
            timesteps=grid,
            classes=[labels.name(i) for i in kept] if k else ["(no classes)"],
            kept_ids=kept if k else [0],
            num_classes=k,
            null_id=null,
            conditioning=unet.config.conditioning,
            sites=sites,
        )

    def place(self, name_or_id: str | int) -> int:
        """Where a kept class stands on the class axis of `values`. Raises InputError for one that is not kept."""
        if self.classes.count(name_or_id) > 1:
            raise InputError(
                f"{name_or_id!r} is the name of a class and the null label: give an id, {self.null_id} for null."
            )
        if name_or_id in self.classes:
            return self.classes.index(name_or_id)
        if name_or_id in self.kept_ids:
            return self.kept_ids.index(name_or_id)
        raise InputError(
            f"the atlas keeps no values of class {name_or_id!r}. It keeps: {', '.join(self.classes[:20])}."
        )

    # ------------------------------------------------------------------ files

    def save(self, file: str | Path) -> Path:
        """An .npz: "values/SITE/FIELD" and the statistics beside it, and "atlas", a json text with axes, sites and names.

        `numpy.load(file)` opens it without this package (no pickle)."""
        file = Path(file)
        arrays = {}
        for name, site in self.sites.items():
            for what, f in site.fields.items():
                for part in ATLAS_PARTS:
                    arrays[f"{part}/{name}/{what}"] = getattr(f, part)
            for own in ("weight", "bias"):
                if getattr(site, own) is not None:
                    arrays[f"{own}/{name}"] = getattr(site, own)
        about = {
            "axes": {"values": ["timestep", "class", "(token)", "channel"]},
            "timesteps": self.timesteps.tolist(),
            "classes": self.classes,
            "kept_ids": self.kept_ids,
            "num_classes": self.num_classes,
            "null_id": self.null_id,
            "conditioning": self.conditioning,
            "model": self.model,
            "sites": [s.site._asdict() | {"fields": list(s.fields)} for s in self.sites.values()],
        }
        tmp = file.with_name(f".{file.name}.new.npz")
        np.savez(tmp, atlas=json.dumps(about), **arrays)
        tmp.replace(file)
        return file

    @classmethod
    def load(cls, file: str | Path) -> "Atlas":
        """Raises InputError for a file that is no atlas."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["atlas"]))
                sites = {}
                for s in about["sites"]:
                    name, names = s["name"], s.pop("fields")
                    fields = {what: Field(*(arrays[f"{part}/{name}/{what}"] for part in ATLAS_PARTS)) for what in names}
                    own = [arrays.get(f"{o}/{name}") for o in ("weight", "bias")]
                    sites[name] = SiteAtlas(Site(**s), *own, fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is not an atlas, as `adagn trace` writes it: {error}") from None
        names = ("classes", "kept_ids", "num_classes", "null_id", "conditioning", "model")
        return cls(timesteps=np.array(about["timesteps"]), sites=sites, **{n: about[n] for n in names})


class _Recorder:
    """Values and sums of every field, filled as the rows come."""

    def __init__(self, timesteps: int, classes: int, kept: dict[int, int], has_classes: bool):
        self.timesteps, self.classes, self.kept = timesteps, max(classes, 1), kept or {0: 0}
        self.real = set(range(classes)) if has_classes else {0}
        self.sums: dict[str, dict[str, _Sums]] = {}

    def add(self, pairs: list[tuple[int, int]], m: dict[str, tuple]) -> None:
        at = np.array([a for a, _ in pairs])
        ids = np.array([i for _, i in pairs])
        stored = [(row, a, self.kept[i]) for row, (a, i) in enumerate(pairs) if i in self.kept]
        rows, places, columns = (np.array(x, dtype=int) for x in zip(*stored)) if stored else ([], [], [])
        real = np.array([i in self.real for _, i in pairs])
        for site, told in m.items():
            for what, tensor in told._asdict().items():
                values = tensor.float().cpu().numpy()
                sums = self.sums.setdefault(site, {})
                if what not in sums:
                    sums[what] = _Sums(self.timesteps, self.classes, len(self.kept), values.shape[1:])
                if len(rows):
                    sums[what].values[places, columns] = values[rows]
                sums[what].add(at[real], ids[real], values[real].astype(np.float64))

    def fields(self, site: str) -> dict[str, Field]:
        return {what: sums.field() for what, sums in self.sums[site].items()}


class _Sums:
    """Running sums of one field, float64."""

    def __init__(self, timesteps: int, classes: int, kept: int, shape: tuple[int, ...]):
        self.values = np.zeros((timesteps, kept, *shape), np.float32)
        self.over_classes = np.zeros((timesteps, *shape))
        self.over_timesteps = np.zeros((classes, *shape))
        self.squares = np.zeros(shape)

    def add(self, at: np.ndarray, ids: np.ndarray, values: np.ndarray) -> None:
        np.add.at(self.over_classes, at, values)
        np.add.at(self.over_timesteps, ids, values)
        self.squares += np.square(values).sum(0)

    def field(self) -> Field:
        """What is left by rounding counts as nothing: below 1e-9 of the mean square."""
        t, k = len(self.over_classes), len(self.over_timesteps)
        mean, size = self.over_classes.sum(0) / (t * k), self.squares / (t * k)

        def real(part: np.ndarray) -> np.ndarray:
            return np.where(part > 1e-9 * size, part, 0)

        by_time = real(np.square(self.over_classes / k - mean).mean(0))
        by_class = real(np.square(self.over_timesteps / t - mean).mean(0))
        by_both = real(size - mean**2 - by_time - by_class)
        return Field(self.values, self.over_classes / k, by_time, by_class, by_both, size)
