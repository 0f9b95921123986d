"""Several classes in one image, by layer and noise level; and interpolation between two classes.

    pipe(class_plan="cat@coarse,dog@fine", seeds=[0, 1])  # the coarse layers receive cat, the fine ones dog
    pipe(class_plan=[ClassInterpolation.parse("cat,dog", pipe.labels, share) for share in (0, 0.5, 1)], seeds=[0, 0, 0])

Only the output of modulation(t, y) is mixed, per site and step.
"""

import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..config import DiffusionConfig
from ..diffusion.process import Process
from ..diffusion.schedule import make_process
from ..errors import InputError
from ..labels import LabelSpace
from ..models.learned import stage_of
from ..models.unet import AdaGNUNet, Modulation, Site

COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq}
COMPARISON = re.compile(r"(depth|t|sigma|)\s*(<=|>=|<|>|=|)\s*(\d+(?:\.\d+)?)(?:x(\d+))?")
WHERE = (
    "coarse, fine, a resolution (8, 8x8, <=8, >8), depth<10, down, middle, up, a pattern of site names (up.*.stages.0*), "
    "a noise level (sigma>2), a timestep (t>600), or several joined by &"
)


@runtime_checkable
class ClassPlan(Protocol):
    """The class that one image receives at each site and noise level. Any object with these members can be sampled.

    Attributes:
        name: shown to users and saved.
        class_id: the class, if the plan is one class everywhere; else None.
    """

    name: str
    class_id: int | None

    def modulation(self, unet: AdaGNUNet, t: Tensor | float, guidance_scale: float | None = None) -> Modulation:
        """The parameters of every site at a noise level.

        Args:
            unet: the network.
            t: what the network receives; under ddpm the timestep, 0..T-1.
            guidance_scale: given for networks that read it only; see `AdaGNUNet.modulation`.

        Returns:
            {site name: Params}, with fields [1, ...].
        """


@dataclass(frozen=True)
class MixRule:
    """One class, and the sites and noise levels that receive it.

    Attributes:
        text: as written by the user.
        class_id: the class.
        sites: names in the order of depth; None for all.
        times: conditions on the time that the network receives, such as (">", 600.0); all must hold.
    """

    text: str
    class_id: int
    sites: tuple[str, ...] | None = None
    times: tuple[tuple[str, float], ...] = ()

    def contains(self, t: float) -> bool:
        return all(COMPARE[sign](t, value) for sign, value in self.times)


@dataclass(frozen=True)
class ClassMix:
    """Classes by site and noise level, as in "cat@coarse,dog@fine" or "bird,cat@8&sigma>2". Later rules override earlier ones.

    A rule is CLASS@WHERE. A class without @ is the default for all other sites. CLASS is what LabelSpace.parse takes for one
    class ("null" too); names may contain commas. WHERE is one of these, or several joined by &:

        coarse, fine          sites whose resolution is at most the geometric middle of the network's resolutions,
                              sqrt(lowest * highest); and the others
        8, 8x8, <=8, >8       resolution: the side of the feature map in pixels
        depth<10              the order in which an image passes the sites, from 0
        down, middle, up      the half of the U-Net
        up.*.stages.0*        a pattern of site names: * any text, ? one character, [12] one of these
        sigma>2               the noise level sigma_t / alpha_t
        t>600                 the timestep, 0 (clean) to T - 1 (noise); under flow 1000 t; edm has none

    Comparisons are <, <=, >, >= and =.
    """

    name: str
    parts: tuple[MixRule, ...]

    @property
    def class_id(self) -> int | None:
        return self.parts[0].class_id if len(self.parts) == 1 and self.parts[0].sites is None else None

    @classmethod
    def single(cls, class_id: int, labels: LabelSpace) -> "ClassMix":
        """One class at all sites and noise levels.

        Args:
            class_id: the class.
            labels: the classes.
        """
        return cls(labels.name(class_id), (MixRule(labels.name(class_id), class_id),))

    @classmethod
    def parse(cls, text: str, labels: LabelSpace, sites: Sequence[Site], process: Process | None = None) -> "ClassMix":
        """Read a mix.

        Args:
            text: such as "cat@coarse,dog@fine".
            labels: the classes.
            sites: `unet.sites()`.
            process: of the network. None: ddpm with the default settings.

        Raises:
            InputError: an unknown class or place, a rule without a site or noise level, or sites or noise levels without a rule.
        """
        process = process or make_process(DiffusionConfig())
        try:
            parts = [_part(*cut, sites, process) for cut in labels.parts_of_mix(text)]
            base = [p for p in parts if p.sites is None]
            if len(base) > 1:
                raise InputError(f"'{base[0].text}' and '{base[1].text}' both apply everywhere: remove one, or add @.")
            if base and len(parts) == 1:
                return cls.single(base[0].class_id, labels)
            mix = cls(" ".join(text.split()), (*base, *(p for p in parts if p.sites is not None)))
            mix._check_times(sites, process)
        except InputError as error:
            raise InputError(f"the mix '{text}': {error}") from None
        return mix

    def class_by_site(self, t: float, names: Sequence[str]) -> dict[str, int]:
        """The class that each site receives.

        Args:
            t: what the network receives; under ddpm the timestep, 0..T-1.
            names: of all sites.

        Returns:
            {site name: class id}; sites without a rule are missing.
        """
        classes: dict[str, int] = {}
        for part in self.parts:
            if part.contains(t):
                classes |= dict.fromkeys(names if part.sites is None else part.sites, part.class_id)
        return classes

    def modulation(self, unet: AdaGNUNet, t: Tensor | float, guidance_scale: float | None = None) -> Modulation:
        """See `ClassPlan.modulation`.

        Args:
            unet: the network.
            t: what the network receives; under ddpm the timestep, 0..T-1.
            guidance_scale: of networks that read it.
        """
        names = [s.name for s in unet.sites()]
        class_of = self.class_by_site(float(t), names)
        missing = [n for n in names if n not in class_of]
        if missing:
            raise InputError(f"the mix '{self.name}' belongs to another network: it has no rule for {missing[0]}.")
        classes = sorted(set(class_of.values()))
        m = unet.modulation(t, torch.tensor(classes), guidance_scale=guidance_scale)
        row = {c: slice(i, i + 1) for i, c in enumerate(classes)}
        class_of |= {
            stage_of(name): c for name, c in class_of.items()
        }  # changes of layers follow the stage's last site
        return {name: type(mod)(*(field[row[class_of[name]]] for field in mod)) for name, mod in m.items()}

    @property
    def class_ids(self) -> list[int]:
        """The classes of the rules."""
        return [part.class_id for part in self.parts]

    def to_dict(self) -> list[dict]:
        """The rules as plain JSON types, lowest priority first."""
        return [{"part": p.text, "class_id": p.class_id, "sites": list(p.sites or ["*"])} for p in self.parts]

    def describe(self, sites: Sequence[Site]) -> str:
        """One line per rule: the sites that it applies to."""
        lines = []
        for part in self.parts:
            named = [s for s in sites if part.sites is None or s.name in part.sites]
            sides = ", ".join(f"{side}x{side}" for side in sorted({s.resolution for s in named}))
            ends = " ... ".join(dict.fromkeys([named[0].name, named[-1].name]))
            where = f"{len(named)} of {len(sites)} sites, at {sides}: {ends}"
            lines.append(f"  {part.text}: {where if part.sites is not None else 'all other sites'}")
        return "\n".join(lines)

    def _check_times(self, sites: Sequence[Site], process: Process) -> None:
        """Between two neighbouring bounds nothing changes, so the bounds and the points halfway between them suffice."""
        first, last = process.times
        bounds = sorted({first, last, *(v for p in self.parts for _, v in p.times if first <= v <= last)})
        probes = sorted([*bounds, *((a + b) / 2 for a, b in itertools.pairwise(bounds))])
        never = [p for p in self.parts if not any(map(p.contains, probes))]
        if never:
            raise InputError(f"'{never[0].text}' matches no noise level: {_range(process)}.")
        names = [s.name for s in sites]
        for t in probes:
            class_of = self.class_by_site(t, names)
            missing = [n for n in names if n not in class_of]
            if missing:
                where = f"sigma = {math.exp(4 * t):g}" if process.name == "edm" else f"t = {t:g}"
                when = f" at {where}" if any(p.times for p in self.parts) else ""
                raise InputError(
                    f"no rule covers {len(missing)} of {len(names)} sites{when} ({', '.join(missing[:3])}"
                    f"{', ...' if len(missing) > 3 else ''}): add a rule for them, or a class without @, which is the default."
                )


@dataclass(frozen=True)
class ClassInterpolation:
    """A class between two: class_vector = (1 - share) * vector of a + share * vector of b.

    Args:
        a: class id at share 0.
        b: class id at share 1.
        share: 0..1.
        ends: the names of a and b.
    """

    a: int
    b: int
    share: float
    ends: tuple[str, str]

    @property
    def name(self) -> str:
        if self.class_id is not None:
            return self.ends[self.class_id == self.b]
        return f"{self.ends[0]} {1 - self.share:g} {self.ends[1]} {self.share:g}"

    @property
    def class_id(self) -> int | None:
        return {0: self.a, 1: self.b}.get(self.share)

    @classmethod
    def parse(cls, text: str, labels: LabelSpace, share: float) -> "ClassInterpolation":
        """Read two classes.

        Args:
            text: two classes, as LabelSpace.parse takes them: "cat,dog".
            labels: the classes.
            share: 0 (the first class) to 1 (the second).

        Raises:
            InputError: they are not two classes, or share is out of range.
        """
        ids = labels.parse(text)
        if len(ids) != 2 or ids[0] == ids[1] or not 0 <= share <= 1:
            names = ", ".join(labels.name(i) for i in ids[:4])
            fault = f"between '{text}' ({names}): give two different classes, such as cat,dog"
            if not 0 <= share <= 1:
                fault = f"by a share of {share:g}: give one from 0 (the first class) to 1 (the second)"
            raise InputError(f"classes cannot be interpolated {fault}.")
        return cls(*ids, share, (labels.name(ids[0]), labels.name(ids[1])))

    def modulation(self, unet: AdaGNUNet, t: Tensor | float, guidance_scale: float | None = None) -> Modulation:
        """See `ClassPlan.modulation`.

        Args:
            unet: the network.
            t: what the network receives; under ddpm the timestep, 0..T-1.
            guidance_scale: of networks that read it.
        """
        if unet.embedding.classes is None:
            why = (
                f"conditioning {unet.config.conditioning} ignores the class"
                if unet.config.num_classes
                else "it has no classes"
            )
            raise InputError(f"this network cannot interpolate classes: {why}. Use a class-conditional network.")
        ends = torch.tensor([self.a, self.b], device=unet.projection.weight.device)
        vectors = torch.lerp(*unet.class_vectors(ends).split(1), self.share)
        m = unet.modulation(t, class_vectors=vectors, guidance_scale=guidance_scale)
        strength = unet.change_strength(ends)
        return m if strength is None else m | unet.stage_strengths(torch.lerp(*strength.split(1), self.share))

    @property
    def class_ids(self) -> list[int]:
        """Both classes."""
        return [self.a, self.b]

    def to_dict(self) -> dict:
        """The settings as plain JSON types."""
        return {"classes": [self.a, self.b], "share": self.share}


@dataclass(frozen=True)
class ClassBySteps:
    """A class for each network evaluation of a call; for `modulation_table`.

    Attributes:
        class_ids: one per evaluation.
    """

    class_ids: tuple[int, ...]
    class_id = None


def modulation_table(
    unet: AdaGNUNet,
    plans: "Sequence[ClassPlan | ClassBySteps]",
    timesteps: Tensor,
    max_bytes: int = 2**26,
    scales: Tensor | None = None,
) -> Callable[[int], Modulation]:
    """A function: index of a step -> the modulation of N images at timesteps[index], one row per image.

    Each (timestep, class, scale) is computed once, in a few matrix products for as many coming steps as fit max_bytes.
    Plans that are not a single class are computed step by step, once for all images that share plan and scale.

    scales: guidance scales [steps, N] of a network that reads them; None: 1.
    """
    device, columns, column_of = unet.projection.weight.device, None, torch.zeros(len(plans), dtype=torch.long)
    if scales is not None:  # images of a column have the same scale at every step
        columns, column_of = scales.cpu().unique(dim=1, return_inverse=True)
    if any(p.class_id is None and not isinstance(p, ClassBySteps) for p in plans):
        keys = [(id(p), column) for p, column in zip(plans, column_of.tolist())]
        distinct = dict(zip(keys, plans))
        row_of = {key: row for row, key in enumerate(distinct)}
        rows = torch.tensor([row_of[key] for key in keys], device=device)

        def at_step(step: int) -> Modulation:
            modulations = [
                _modulation(p, unet, timesteps, step, None if columns is None else columns[step, column].item())
                for (_, column), p in distinct.items()
            ]
            return {
                name: type(mod)(*(torch.cat(fields)[rows] for fields in zip(*(m[name] for m in modulations))))
                for name, mod in modulations[0].items()
            }

        return at_step

    ids = [p.class_ids if isinstance(p, ClassBySteps) else [p.class_id] * len(timesteps) for p in plans]
    count = 1 if columns is None else columns.shape[1]
    pairs = torch.tensor(ids, device=device).T * count + column_of.to(device)
    pairs, rows = pairs.unique(return_inverse=True)  # rows [steps, N]
    classes, column_of = pairs // count, (pairs % count).cpu()
    if not unet.config.num_classes:
        classes, rows = classes[:1], torch.zeros_like(rows)
    width = unet.projection.out_features
    if unet.token_projection is not None:
        width += unet.token_projection.out_features * unet.config.class_tokens
    block = max(1, min(len(timesteps), max_bytes // (4 * width * len(classes))))
    cached: dict[int, list[Tensor | None]] = {}  # first step of a block -> [step, class, ...]

    def table_lookup(step: int) -> Modulation:
        first = step // block * block
        if first not in cached:
            cached.clear()
            steps = timesteps[first : first + block].to(device)
            t = steps.repeat_interleave(len(classes))
            y = classes.repeat(len(steps)) if unet.config.num_classes else None
            s = None if columns is None else columns[first : first + block, column_of].flatten()
            projected = unet.project_condition(t, y, guidance_scale=s)
            cached[first] = [p if p is None else p.unflatten(0, (len(steps), len(classes))) for p in projected]
        return unet.split_modulation(
            *(p if p is None else p[step - first].index_select(0, rows[step]) for p in cached[first])
        )

    return table_lookup


def _modulation(
    plan: "ClassPlan | ClassBySteps", unet: AdaGNUNet, timesteps: Tensor, step: int, scale: float | None
) -> Modulation:
    if isinstance(plan, ClassBySteps):
        return unet.modulation(timesteps[step], torch.tensor([plan.class_ids[step]]), guidance_scale=scale)
    return plan.modulation(unet, timesteps[step], *([] if scale is None else [scale]))


# ---------------------------------------------------------------------- grammar


def _range(process: Process) -> str:
    """The noise levels of a process, for a message."""
    (first, last), (low, high) = process.times, _ends(process)
    return f"sigma is from {low:.3g} to {high:.3g}{f', t from {first:g} to {last:g}' * (process.name != 'edm')}"


def _ends(process: Process) -> tuple[float, float]:
    """The lowest and the highest noise level of a process; infinity where nothing of the image is left."""
    level = process.level(torch.tensor(process.times, dtype=torch.float64))
    return tuple((level.sigma / level.alpha).tolist())


def _time(process: Process, sigma: float) -> float:
    """The time at a noise level; infinite beyond those of the process."""
    low, high = _ends(process)
    return process.time_of(sigma) if low <= sigma <= high else math.copysign(math.inf, sigma - low)


def _part(text: str, class_id: int, where: str | None, sites: Sequence[Site], process: Process) -> MixRule:
    if where is None:
        return MixRule(text, class_id)
    places, times = [], []
    for word in (w.strip() for w in where.split("&")):
        match = COMPARISON.fullmatch(word)
        if match and match[1] in ("t", "sigma") and match[2] and not match[4]:
            value = float(match[3])
            if match[1] == "t" and process.name == "edm":
                raise InputError(f"'{text}': process edm has no timesteps; write a noise level, such as sigma>2.")
            times.append((match[2], value if match[1] == "t" else _time(process, value)))
        else:
            places.append(word)
    named = sites_at("&".join(places), sites) if places else sites
    return MixRule(text, class_id, tuple(s.name for s in named), tuple(times))


def sites_at(where: str, sites: Sequence[Site]) -> list[Site]:
    """The sites at a place such as "coarse" or "<=8&up" (WHERE of `ClassMix`, without noise levels).

    Raises:
        InputError: an unknown place, or no site is there.
    """
    named = list(sites)
    for word in where.split("&"):
        named = [s for s in named if _place(word.strip(), sites)(s)]
    if not named:
        sides = ", ".join(f"{r}x{r}" for r in sorted({s.resolution for s in sites}))
        raise InputError(
            f"'{where}' matches no site. There are {len(sites)}, of resolution {sides} and depth 0..{len(sites) - 1}, named like "
            f"{sites[0].name}."
        )
    return named


def _place(word: str, sites: Sequence[Site]) -> Callable[[Site], bool]:
    """A test of whether a site matches the word."""
    if word in ("coarse", "fine"):
        sides = [s.resolution for s in sites]
        return lambda s: (s.resolution**2 <= min(sides) * max(sides)) == (word == "coarse")
    if word in ("down", "middle", "up"):
        return lambda s: s.name.split(".")[0] == word
    match = COMPARISON.fullmatch(word)
    if match and match[1] == "depth" and match[2] and not match[4]:
        return lambda s: COMPARE[match[2]](s.depth, float(match[3]))
    if match and not match[1] and match[4] in (None, match[3]):
        return lambda s: COMPARE[match[2] or "="](s.resolution, float(match[3]))
    if any(c in word for c in "*?[") or any(word == s.name for s in sites):
        return lambda s: fnmatchcase(s.name, word)
    raise InputError(f"'{word}' is not a place in the network. Expected {WHERE}.")
