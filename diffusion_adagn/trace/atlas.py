"""The modulation atlas: the modulation of every site over noise levels and classes. It needs no image.

    atlas = Atlas.of(pipe.unet, pipe.labels, process=pipe.process)
    atlas.sites["up.1.stages.0.block.norm2"].fields["gamma"].values   # [timesteps, classes, channels]

The grid is computed in batches. The statistics cover all classes; with many classes, values are stored for some of
them.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..diffusion.process import Process
from ..errors import InputError
from ..labels import LabelSpace
from ..models.unet import AdaGNUNet, Site, frozen
from ..renamed import renamed_arguments
from ..schema import short_repr
from .levels import NoiseLevels, evenly_spread
from .scale import scale_changes, shown_scales

MAX_STORED_CLASSES = 64  # null included; the statistics are over all classes
BATCH_ROWS = 256  # (timestep, class) pairs in one call of `modulation`
ATLAS_PARTS = ("values", "class_mean", "by_time", "by_class", "by_both", "mean_square")


@dataclass
class ModulationField:
    """One parameter of a site's modulation, such as gamma, over a grid of T timesteps and K classes.

    The variance over the grid is the sum of three parts (Fisher's two-way analysis of variance, one value per cell):

        x[t, k] = mean + (mean over k - mean) + (mean over t - mean) + the rest

    Args:
        values: float32 [T, stored classes, ...]; the other axes are channels, or tokens and channels.
        class_mean: float64 [T, ...], mean over the K classes. This and the following exclude the null label.
        by_time: float64 [...], variance that is due to the timestep alone.
        by_class: float64 [...], variance that is due to the class alone.
        by_both: float64 [...], variance of their interaction.
        mean_square: float64 [...], mean of x^2.
        by_scale: float64 [S, T], the RMS change from guidance scale 1 to the atlas's `scales`; None where it has none.
    """

    values: np.ndarray
    class_mean: np.ndarray
    by_time: np.ndarray
    by_class: np.ndarray
    by_both: np.ndarray
    mean_square: np.ndarray
    by_scale: np.ndarray | None = None


@dataclass
class SiteAtlas:
    """A site, weight and bias of its norm ([channels], None where it has none), and its fields by name."""

    site: Site
    weight: np.ndarray | None
    bias: np.ndarray | None
    fields: dict[str, ModulationField]


@dataclass
class Atlas:
    """The modulation of every site over noise levels and classes, with its statistics.

    Args:
        timesteps: float64 [T], what the network receives: t under ddpm, 1000 t under flow, ln(sigma) / 4 under edm.
        classes: Names of the stored classes; after those of training "null", then learned ones.
        class_ids: Ids of the stored classes, in the same order.
        num_classes: K, without the null label.
        null_id: Id of the null label; None without one.
        conditioning: The network's conditioning, such as "adagn".
        sites: Sites by name, in the order of the forward pass.
        model: Where the network comes from: source, weights, hash.
        sigma: float64 [T], the noise levels sigma_t / alpha_t. None: not known.
        process: "ddpm", "edm" or "flow".
        scales: float64 [S], guidance scales above 1 of a network that reads them; everything but `by_scale` is at scale 1.
            Empty for others.
    """

    timesteps: np.ndarray
    classes: list[str]
    class_ids: list[int]
    num_classes: int
    null_id: int | None
    conditioning: str
    sites: dict[str, SiteAtlas]
    model: dict = field(default_factory=dict)
    sigma: np.ndarray | None = None
    process: str = "ddpm"
    scales: np.ndarray = field(default_factory=lambda: np.empty(0))

    @classmethod
    @renamed_arguments(keep="class_ids")
    @torch.no_grad()
    def of(
        cls,
        unet: AdaGNUNet,
        labels: LabelSpace,
        timesteps: Sequence[float] | int = 50,
        num_train_timesteps: int = 1000,
        class_ids: Sequence[int] | None = None,
        progress: bool = False,
        process: Process | None = None,
    ) -> "Atlas":
        """Compute the modulation of every site over the grid.

        Args:
            unet: The network.
            labels: Its classes.
            timesteps: The times that the network receives, or how many, evenly spread between image and noise.
            num_train_timesteps: Timesteps of ddpm; not used if the process is given.
            class_ids: Ids in 0..K-1 of the classes whose values are stored; those of the null label and of learned classes
                are always stored. None: all if there are at most 64, else the first 63.
            progress: Show a progress bar.
            process: Of the network, such as `pipe.process`. None: ddpm, with noise levels that are not known.

        Returns:
            The atlas; its statistics are over all K classes.

        Raises:
            InputError: For timesteps or class ids that are out of range.
        """
        if isinstance(timesteps, int):
            spread = np.linspace(0, num_train_timesteps - 1, timesteps).round()
            timesteps = spread if process is None else evenly_spread(process, timesteps)
        grid = np.asarray(timesteps, dtype=np.float64)
        k, null = labels.K, labels.null_id if labels.K and labels.has_null else None
        if class_ids is None:
            class_ids = range(k if k <= MAX_STORED_CLASSES else MAX_STORED_CLASSES - 1)
        class_ids = list(dict.fromkeys(class_ids))
        has_t = process is None or process.name != "edm"
        valid = grid.ndim == 1 and len(grid) and np.isfinite(grid).all() and not (has_t and grid.min() < 0)
        if not valid or any(not 0 <= i < k for i in class_ids):
            raise InputError(
                f"timesteps are numbers{' of at least 0' * has_t} and class_ids in 0..{k - 1}, not {short_repr(timesteps)} and {short_repr(class_ids)}."
            )
        others = ([null] if null is not None else []) + list(labels.learned_ids)
        ids, stored = list(range(k)) + others, class_ids + others
        builder = _AtlasBuilder(len(grid), k, {i: index for index, i in enumerate(stored)}, bool(k))
        device = unet.device
        pairs = [(a, i) for a in range(len(grid)) for i in (ids or [0])]
        with frozen(unet):
            for start in tqdm(
                range(0, len(pairs), BATCH_ROWS), desc="atlas", unit="batch", disable=not progress, leave=False
            ):
                batch = pairs[start : start + BATCH_ROWS]
                t = torch.tensor([grid[a] for a, _ in batch], dtype=torch.float32, device=device)
                y = torch.tensor([i for _, i in batch], device=device) if k else None
                m = unet.modulation(t, y)
                builder.add(batch, {site.name: m[site.name] for site in unet.sites()})
            scales = shown_scales(unet)
            changes = scale_changes(unet, grid, scales) if len(scales) else {}
        sites = {}
        for site in unet.sites():
            norm = unet.get_submodule(site.name)
            affine = [getattr(norm, name, None) for name in ("weight", "bias")]
            affine = [None if p is None else p.detach().cpu().double().numpy() for p in affine]
            fields = builder.fields(site.name)
            for parameter, change in changes.get(site.name, {}).items():
                fields[parameter].by_scale = change
            sites[site.name] = SiteAtlas(site, *affine, fields)
        return cls(
            timesteps=grid,
            classes=[labels.name(i) for i in stored] if k else ["(no classes)"],
            class_ids=stored if k else [0],
            num_classes=k,
            null_id=null,
            conditioning=unet.config.conditioning,
            sites=sites,
            sigma=None if process is None else np.array(NoiseLevels.of(process, grid).sigmas),
            process="ddpm" if process is None else process.name,
            scales=scales,
        )

    @property
    def levels(self) -> NoiseLevels:
        """The noise levels, as the report shows them."""
        return NoiseLevels(self.timesteps.tolist(), None if self.sigma is None else self.sigma.tolist(), self.process)

    def class_index(self, name_or_id: str | int) -> int:
        """Index of a stored class on the class axis of `values`.

        Args:
            name_or_id: The class's name or id; "null" for the null label.

        Returns:
            Its index.

        Raises:
            InputError: If the class is not stored, or a class is named "null" besides the null label.
        """
        known = [*self.classes, *self.class_ids] if name_or_id not in self.classes else self.classes
        if known.count(name_or_id) != 1:
            twice = f"{name_or_id!r} is the name of a class and the null label: give an id, {self.null_id} for null."
            missing = f"the atlas stores no values of class {name_or_id!r}. It stores: {', '.join(self.classes[:20])}."
            raise InputError(twice if name_or_id in known else missing)
        return known.index(name_or_id) % len(self.classes)

    def place(self, name_or_id: str | int) -> int:
        """The old name of `class_index`."""
        warnings.warn("Atlas.place is called class_index now.", DeprecationWarning, stacklevel=2)
        return self.class_index(name_or_id)

    @property
    def kept_ids(self) -> list[int]:
        """The old name of `class_ids`."""
        warnings.warn("Atlas.kept_ids is called class_ids now.", DeprecationWarning, stacklevel=2)
        return self.class_ids

    # ------------------------------------------------------------------ files

    def save(self, file: str | Path) -> Path:
        """Write the atlas as an .npz file, which `numpy.load(file)` opens without this package (no pickle).

        "values/SITE/FIELD", the statistics and "sigma" are arrays; "atlas" is a JSON text with axes, sites and names.

        Args:
            file: The path.

        Returns:
            The path.
        """
        file = Path(file)
        arrays = {} if self.sigma is None else {"sigma": self.sigma}
        arrays |= {"scales": self.scales} if len(self.scales) else {}
        for name, site in self.sites.items():
            for parameter, f in site.fields.items():
                for part in ATLAS_PARTS:
                    arrays[f"{part}/{name}/{parameter}"] = getattr(f, part)
                if f.by_scale is not None:
                    arrays[f"by_scale/{name}/{parameter}"] = f.by_scale
            for affine in ("weight", "bias"):
                if getattr(site, affine) is not None:
                    arrays[f"{affine}/{name}"] = getattr(site, affine)
        header = {
            "axes": {"values": ["timestep", "class", "(token)", "channel"]},
            "timesteps": self.timesteps.tolist(),
            "process": self.process,
            "classes": self.classes,
            "kept_ids": self.class_ids,  # the key since the first version
            "num_classes": self.num_classes,
            "null_id": self.null_id,
            "conditioning": self.conditioning,
            "model": self.model,
            "sites": [s.site._asdict() | {"fields": list(s.fields)} for s in self.sites.values()],
        }
        tmp = file.with_name(f".{file.name}.new.npz")
        np.savez(tmp, atlas=json.dumps(header), **arrays)
        tmp.replace(file)
        return file

    @classmethod
    def load(cls, file: str | Path) -> "Atlas":
        """Read an atlas that `save` wrote.

        Args:
            file: The path.

        Returns:
            The atlas.

        Raises:
            InputError: If the file is not an atlas.
        """
        try:
            with np.load(file, allow_pickle=False) as arrays:
                header = json.loads(str(arrays["atlas"]))
                sigma = arrays.get("sigma")  # since the process edm
                scales = arrays.get("scales", np.empty(0))
                sites = {}
                for s in header["sites"]:
                    name, parameters = s["name"], s.pop("fields")
                    fields = {
                        p: ModulationField(
                            *(arrays[f"{part}/{name}/{p}"] for part in ATLAS_PARTS),
                            by_scale=arrays.get(f"by_scale/{name}/{p}"),
                        )
                        for p in parameters
                    }
                    affine = [arrays.get(f"{p}/{name}") for p in ("weight", "bias")]
                    sites[name] = SiteAtlas(Site(**s), *affine, fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is not an atlas as `adagn trace` writes it: {error}") from None
        names = ("classes", "num_classes", "null_id", "conditioning", "model")
        return cls(
            timesteps=np.array(header["timesteps"]),
            class_ids=header["kept_ids"],
            sites=sites,
            sigma=sigma,
            process=header.get("process", "ddpm"),
            scales=scales,
            **{name: header[name] for name in names},
        )


class _AtlasBuilder:
    """Values and sums of every field, filled batch by batch. stored: {class id: index on the class axis}."""

    def __init__(self, timesteps: int, classes: int, stored: dict[int, int], has_classes: bool):
        self.timesteps, self.classes, self.stored = timesteps, max(classes, 1), stored or {0: 0}
        self.real = set(range(classes)) if has_classes else {0}
        self.sums: dict[str, dict[str, _FieldSums]] = {}

    def add(self, pairs: list[tuple[int, int]], m: dict[str, tuple]) -> None:
        """pairs: (timestep index, class id) of each row of the modulation `m`."""
        t_index = np.array([a for a, _ in pairs])
        ids = np.array([i for _, i in pairs])
        stored = [(row, a, self.stored[i]) for row, (a, i) in enumerate(pairs) if i in self.stored]
        rows, t_stored, columns = (np.array(x, dtype=int) for x in zip(*stored)) if stored else ([], [], [])
        real = np.array([i in self.real for _, i in pairs])
        for site, params in m.items():
            for parameter, tensor in params._asdict().items():
                values = tensor.float().cpu().numpy()
                sums = self.sums.setdefault(site, {})
                if parameter not in sums:
                    sums[parameter] = _FieldSums(self.timesteps, self.classes, len(self.stored), values.shape[1:])
                if len(rows):
                    sums[parameter].values[t_stored, columns] = values[rows]
                sums[parameter].add(t_index[real], ids[real], values[real].astype(np.float64))

    def fields(self, site: str) -> dict[str, ModulationField]:
        return {parameter: sums.field() for parameter, sums in self.sums[site].items()}


class _FieldSums:
    """Running sums of one field, float64."""

    def __init__(self, timesteps: int, classes: int, stored: int, shape: tuple[int, ...]):
        self.values = np.zeros((timesteps, stored, *shape), np.float32)
        self.over_classes = np.zeros((timesteps, *shape))
        self.over_timesteps = np.zeros((classes, *shape))
        self.squares = np.zeros(shape)

    def add(self, t_index: np.ndarray, ids: np.ndarray, values: np.ndarray) -> None:
        np.add.at(self.over_classes, t_index, values)
        np.add.at(self.over_timesteps, ids, values)
        self.squares += np.square(values).sum(0)

    def field(self) -> ModulationField:
        """The statistics. A part of the variance below 1e-9 of the mean square is rounding and counts as 0."""
        t, k = len(self.over_classes), len(self.over_timesteps)
        mean, size = self.over_classes.sum(0) / (t * k), self.squares / (t * k)

        def without_rounding(part: np.ndarray) -> np.ndarray:
            return np.where(part > 1e-9 * size, part, 0)

        by_time = without_rounding(np.square(self.over_classes / k - mean).mean(0))
        by_class = without_rounding(np.square(self.over_timesteps / t - mean).mean(0))
        by_both = without_rounding(size - mean**2 - by_time - by_class)
        return ModulationField(self.values, self.over_classes / k, by_time, by_class, by_both, size)
