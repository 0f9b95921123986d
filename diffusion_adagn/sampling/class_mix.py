"""One picture of several classes: who is told which class, by place and time; and classes between two classes.

    pipe(told="cat@coarse,dog@fine", seeds=[0, 1])  # the coarse layers are told cat, the fine ones dog
    pipe(told=[Between.parse("cat,dog", pipe.labels, share) for share in (0, 0.5, 1)], seeds=[0, 0, 0])

It needs no picture: what is mixed is what modulation(t, y) says, site by site and step by step.
"""

import itertools
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import InputError
from ..labels import LabelSpace
from ..models.unet import AdaGNUNet, Modulation, Site

COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq}
COMPARISON = re.compile(r"(depth|t|)\s*(<=|>=|<|>|=|)\s*(\d+(?:\.\d+)?)(?:x(\d+))?")
WHERE = (
    "coarse, fine, a resolution (8, 8x8, <=8, >8), depth<10, down, middle, up, a pattern of site names (up.*.stages.0*), "
    "a time (t>600), or several joined by &"
)


@runtime_checkable
class ClassPlan(Protocol):
    """What one picture is told.

    name: for people and for the record. class_id: the class where the plan is one plain class, else None.
    """

    name: str
    class_id: int | None

    def modulation(self, unet: AdaGNUNet, t: Tensor | float) -> Modulation:
        """What every site is told at timestep t: one row, Told's fields [1, ...]."""


@dataclass(frozen=True)
class MixRule:
    """One class and where and when it is told. sites: names in the order of depth, None for all; times: what t must fulfil."""

    text: str
    class_id: int
    sites: tuple[str, ...] | None = None
    times: tuple[tuple[str, float], ...] = ()

    def holds(self, t: float) -> bool:
        return all(COMPARE[sign](t, value) for sign, value in self.times)


@dataclass(frozen=True)
class ClassMix:
    """Classes by place and time, as in "cat@coarse,dog@fine" or "bird,cat@8&t>600". Later parts win.

    A part is CLASS@WHERE; one without @ is told wherever no other part is, in whatever order they stand. CLASS is what
    LabelSpace.parse takes for one class ("null" too); names may hold commas. WHERE is one of these, or several joined by &:

        coarse, fine          sites whose resolution is at most the geometric middle of the network's resolutions,
                              sqrt(lowest * highest); and the others
        8, 8x8, <=8, >8       resolution: the side of the feature map in pixels
        depth<10              the order in which the picture meets the sites, from 0
        down, middle, up      the way through the U
        up.*.stages.0*        a pattern of site names: * anything, ? one character, [12] one of these
        t>600                 the timestep, 0 (clean) to T - 1 (noise)

    Comparisons are <, <=, >, >= and =.
    """

    name: str
    parts: tuple[MixRule, ...]

    @property
    def class_id(self) -> int | None:
        return self.parts[0].class_id if len(self.parts) == 1 and self.parts[0].sites is None else None

    @classmethod
    def everywhere(cls, class_id: int, labels: LabelSpace) -> "ClassMix":
        """One plain class."""
        return cls(labels.name(class_id), (MixRule(labels.name(class_id), class_id),))

    @classmethod
    def parse(cls, text: str, labels: LabelSpace, sites: Sequence[Site], timesteps: int = 1000) -> "ClassMix":
        """sites: `unet.sites()`; timesteps: T.

        Raises InputError for what is no class or no place, a part that names no site or no timestep, and sites or
        timesteps that no part names.
        """
        try:
            parts = [_part(*cut, sites) for cut in labels.parts_of_mix(text)]
            base = [p for p in parts if p.sites is None]
            if len(base) > 1:
                raise InputError(
                    f"'{base[0].text}' and '{base[1].text}' are both told everywhere: leave one, or add @."
                )
            if base and len(parts) == 1:
                return cls.everywhere(base[0].class_id, labels)
            if not labels.K:
                raise InputError("the model is unconditional: there are no classes to mix.")
            mix = cls(" ".join(text.split()), (*base, *(p for p in parts if p.sites is not None)))
            mix._check_times(sites, timesteps)
        except InputError as error:
            raise InputError(f"the mix '{text}': {error}") from None
        return mix

    def heard(self, t: float, names: Sequence[str]) -> dict[str, int]:
        """The class that each site is told at t, {site name: class id}; sites that nobody tells are missing."""
        told: dict[str, int] = {}
        for part in self.parts:
            if part.holds(t):
                told |= dict.fromkeys(names if part.sites is None else part.sites, part.class_id)
        return told

    def modulation(self, unet: AdaGNUNet, t: Tensor | float) -> Modulation:
        names = [s.name for s in unet.sites()]
        heard = self.heard(float(t), names)
        silent = [n for n in names if n not in heard]
        if silent:
            raise InputError(f"the mix '{self.name}' was made for another network: it does not tell {silent[0]}.")
        classes = sorted(set(heard.values()))
        m = unet.modulation(t, torch.tensor(classes))
        row = {c: slice(i, i + 1) for i, c in enumerate(classes)}
        return {name: type(told)(*(field[row[heard[name]]] for field in told)) for name, told in m.items()}

    def to_dict(self) -> list[dict]:
        """The parts as plain JSON types, weakest first."""
        return [{"part": p.text, "class_id": p.class_id, "sites": list(p.sites or ["*"])} for p in self.parts]

    def describe(self, sites: Sequence[Site]) -> str:
        """Which sites each part names, a line a part."""
        lines = []
        for part in self.parts:
            named = [s for s in sites if part.sites is None or s.name in part.sites]
            sides = ", ".join(f"{side}x{side}" for side in sorted({s.resolution for s in named}))
            ends = " ... ".join(dict.fromkeys([named[0].name, named[-1].name]))
            where = f"{len(named)} of {len(sites)} sites, at {sides}: {ends}"
            lines.append(f"  {part.text}: {where if part.sites is not None else 'wherever no other part is'}")
        return "\n".join(lines)

    def _check_times(self, sites: Sequence[Site], timesteps: int) -> None:
        """Between two neighbouring bounds nothing changes, so the bounds and the middles between them are all there is."""
        last = timesteps - 1
        bounds = sorted({0.0, float(last), *(v for p in self.parts for _, v in p.times if v <= last)})
        probes = sorted([*bounds, *((a + b) / 2 for a, b in itertools.pairwise(bounds))])
        never = [p for p in self.parts if not any(map(p.holds, probes))]
        if never:
            raise InputError(f"'{never[0].text}' names no timestep: they are 0..{last}.")
        names = [s.name for s in sites]
        for t in probes:
            heard = self.heard(t, names)
            silent = [n for n in names if n not in heard]
            if silent:
                when = f" at t = {t:g}" if any(p.times for p in self.parts) else ""
                raise InputError(
                    f"no part names {len(silent)} of {len(names)} sites{when} ({', '.join(silent[:3])}"
                    f"{', ...' if len(silent) > 3 else ''}): add a part for them, or a class without @, which is told to the rest."
                )


@dataclass(frozen=True)
class ClassInterpolation:
    """A class between two: class_vector = (1 - share) * vector of a + share * vector of b. Shares 0 and 1 are a and b.

    a, b: class ids; ends: their names.
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
        """text: two classes, as LabelSpace.parse takes them: "cat,dog". Raises InputError unless they are two, and share 0..1."""
        ids = labels.parse(text)
        if len(ids) != 2 or ids[0] == ids[1]:
            names = ", ".join(labels.name(i) for i in ids[:4])
            raise InputError(f"'{text}' is {names}: expected two different classes, such as cat,dog.")
        if not 0 <= share <= 1:
            raise InputError(f"a share is a number from 0 (the first class) to 1 (the second), not {share}.")
        return cls(*ids, share, (labels.name(ids[0]), labels.name(ids[1])))

    def modulation(self, unet: AdaGNUNet, t: Tensor | float) -> Modulation:
        table = unet.embedding.classes
        if table is None:
            why = f"conditioning {unet.config.conditioning} hears none" if unet.config.num_classes else "it has none"
            raise InputError(
                f"nothing lies between two classes in this network: {why}. Sample one that hears its classes."
            )
        a, b = unet.embedding.class_vectors(torch.tensor([self.a, self.b], device=table.weight.device)).split(1)
        return unet.modulation(t, class_vectors=torch.lerp(a, b, self.share))

    def to_dict(self) -> dict:
        return {"classes": [self.a, self.b], "share": self.share}


def modulation_table(
    unet: AdaGNUNet, plans: Sequence[ClassPlan], timesteps: Tensor, most_bytes: int = 2**26
) -> Callable[[int], Modulation]:
    """Number of a step -> what N pictures are told at timesteps[number], a row each.

    Each (timestep, class) is told once, all of them in a few matrix products: those of the coming steps are kept, as many
    as fit most_bytes. Plans that are no plain class are told step by step, each once for all pictures that have it.
    """
    device = unet.projection.weight.device
    if any(p.class_id is None for p in plans):
        distinct = {id(p): p for p in plans}
        places = {key: place for place, key in enumerate(distinct)}
        rows = torch.tensor([places[id(p)] for p in plans], device=device)

        def tell(step: int) -> Modulation:
            short_repr = [p.modulation(unet, timesteps[step]) for p in distinct.values()]
            return {
                name: type(told)(*(torch.cat(fields)[rows] for fields in zip(*(m[name] for m in short_repr))))
                for name, told in short_repr[0].items()
            }

        return tell

    classes, rows = torch.tensor([p.class_id for p in plans], device=device).unique(return_inverse=True)
    if not unet.config.num_classes:
        classes, rows = classes[:1], torch.zeros_like(rows)
    width = unet.projection.out_features
    if unet.token_projection is not None:
        width += unet.token_projection.out_features * unet.config.class_tokens
    at_once = max(1, min(len(timesteps), most_bytes // (4 * width * len(classes))))
    kept: dict[int, list[Tensor | None]] = {}  # by the first of its steps: [step, class, ...]

    def table_lookup(step: int) -> Modulation:
        first = step // at_once * at_once
        if first not in kept:
            kept.clear()
            some = timesteps[first : first + at_once].to(device)
            t = some.repeat_interleave(len(classes))
            projected = unet.project_condition(t, classes.repeat(len(some)) if unet.config.num_classes else None)
            kept[first] = [p if p is None else p.unflatten(0, (len(some), len(classes))) for p in projected]
        return unet.split_modulation(*(p if p is None else p[step - first].index_select(0, rows) for p in kept[first]))

    return table_lookup


# ---------------------------------------------------------------------- grammar


def _part(text: str, class_id: int, where: str | None, sites: Sequence[Site]) -> MixRule:
    if where is None:
        return MixRule(text, class_id)
    named, times = list(sites), []
    for word in (w.strip() for w in where.split("&")):
        match = COMPARISON.fullmatch(word)
        if match and match[1] == "t" and match[2] and not match[4]:
            times.append((match[2], float(match[3])))
        else:
            named = [s for s in named if _place(word, sites)(s)]
    if not named:
        sides = ", ".join(f"{r}x{r}" for r in sorted({s.resolution for s in sites}))
        raise InputError(
            f"'{text}' names no site. There are {len(sites)}, of resolution {sides} and depth 0..{len(sites) - 1}, named like "
            f"{sites[0].name}."
        )
    return MixRule(text, class_id, tuple(s.name for s in named), tuple(times))


def _place(word: str, sites: Sequence[Site]) -> Callable[[Site], bool]:
    """Whether a site is at the place that the word means."""
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
    raise InputError(f"'{word}' is no place. Expected {WHERE}.")
