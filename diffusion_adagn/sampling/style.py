"""Style vectors: class vectors that are added, mixed, truncated and moved along principal directions.

    pipe(class_plan=pipe.style("cat - dog + truck"), seeds=[0, 1])
    pipe(class_plan=pipe.style("cat + 1.5*direction:1", psi=0.7), seeds=[0, 1])

A class is a vector that `modulation` reads, as w is in StyleGAN (Karras et al. 2019, arXiv 1812.04948). So the same
operations work. The null label and guidance do not change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..diffusion.process import Process
from ..errors import InputError
from ..labels import LabelSpace
from ..models.learned import stage_of
from ..models.unet import AdaGNUNet, Modulation, Site
from .class_mix import sites_at

TERM = re.compile(r"(?:(\d+(?:\.\d+)?)\s*\*\s*)?(.+)", re.DOTALL)
DIRECTION = "direction:"
MAX_DIRECTIONS = 20
MAX_PSI = 10.0  # far outside of what the network has seen
LEVELS = 8  # noise levels over which directions of the modulation are averaged


@dataclass(frozen=True)
class StyleRule:
    """A sum of class vectors, and the sites that receive it.

    Args:
        weights: (class id, weight) of each class; the weights add up to 1.
        sites: Names; None for all.
        shift: float32 [class_dim], added to the sum; None: nothing.
    """

    weights: tuple[tuple[int, float], ...]
    sites: tuple[str, ...] | None = None
    shift: Tensor | None = None

    def moved(self, shift: Tensor) -> StyleRule:
        """The same with this added. shift: [class_dim]."""
        return replace(self, shift=shift if self.shift is None else self.shift + shift)

    def to_dict(self) -> dict:
        """The rule as plain JSON types."""
        shift = {} if self.shift is None else {"shift": self.shift.tolist()}
        return {"weights": dict(self.weights), "sites": list(self.sites or ["*"]), **shift}


@dataclass(frozen=True)
class Style:
    """A `ClassPlan`: class vectors by site, truncated and moved.

        vector(site) = mean + psi(site) * (sum of weights * class vectors - mean) + shift(site)

    mean is that of all classes of the training data. Later rules override earlier ones.

    Args:
        name: As written by the user.
        rules: The first one applies everywhere.
        psi: (site names or None for all, psi). psi 1 changes nothing, 0 gives the mean class.
    """

    name: str
    rules: tuple[StyleRule, ...]
    psi: tuple[tuple[tuple[str, ...] | None, float], ...] = ()
    class_id: None = None

    @classmethod
    def parse(
        cls,
        text: str,
        labels: LabelSpace,
        sites: Sequence[Site],
        directions: Callable[[], Tensor] | None = None,
    ) -> Style:
        """Read a sum of classes, or several by site.

        Args:
            text: Terms with spaces around + and -, such as "cat - dog + truck" or "0.5*cat + 0.5*dog". EXPRESSION@WHERE
                after a comma changes some sites: "cat, 0.5*cat + 0.5*dog@fine"; WHERE as in `ClassMix`. A name with commas,
                @ or such signs is written as its id, id:3. "direction:1" is the first principal direction.
            labels: The classes.
            sites: `unet.sites()`.
            directions: () -> `Directions.vectors`, called if the text names a direction.

        Raises:
            InputError: An unknown class, place or direction, weights that do not add up to 1, or sites without a rule.
        """
        try:
            rules = [_rule(part.strip(), labels, sites, directions) for part in text.split(",")]
            base = [rule for rule in rules if rule.sites is None]
            if len(base) > 1:
                raise InputError("two expressions apply everywhere: remove one, or add @.")
            covered = {name for rule in rules for name in rule.sites or ()}
            if not base and (missing := [site.name for site in sites if site.name not in covered]):
                raise InputError(f"no expression covers {missing[0]}: add one without @, which is the default.")
        except InputError as error:
            raise InputError(f"the style '{text}': {error}") from None
        return cls(" ".join(text.split()), (*base, *(rule for rule in rules if rule.sites is not None)))

    @classmethod
    def of_class(cls, class_id: int, labels: LabelSpace) -> Style:
        """The vector of one class."""
        return cls(labels.name(class_id), (StyleRule(((class_id, 1.0),)),))

    def truncated(self, psi: float | str, sites: Sequence[Site] = ()) -> Style:
        """The same, closer to the mean class (psi below 1) or further from it.

        Args:
            psi: A number, or WHERE:psi with commas between, such as "coarse:0.5,fine:1" or "8:0.5,16:0.8".
            sites: `unet.sites()`, for a text.

        Raises:
            InputError: An unknown place, or not a number.
        """
        rules: list[tuple[tuple[str, ...] | None, float]] = []
        for part in str(psi).split(","):
            where, _, number = part.strip().rpartition(":")
            try:
                value = float(number)
            except ValueError:
                value = math.nan
            if not abs(value) <= MAX_PSI:
                expected = f"a number of at most {MAX_PSI:g} such as 0.7, or WHERE:number such as coarse:0.5,fine:1"
                raise InputError(f"truncation psi: expected {expected}, got '{psi}'.")
            rules.append((tuple(s.name for s in sites_at(where, sites)) if where else None, value))
        return replace(self, name=f"{self.name} psi {psi}", psi=tuple(rules))

    def moved(self, direction: Tensor, amount: float, name: str) -> Style:
        """The same, moved by amount * direction. direction: [class_dim], such as one of `Directions.vectors`."""
        rules = tuple(rule.moved(amount * direction) for rule in self.rules)
        return replace(self, name=f"{self.name} {name}", rules=rules)

    def modulation(self, unet: AdaGNUNet, t: Tensor | float, guidance_scale: float | None = None) -> Modulation:
        """See `ClassPlan.modulation`."""
        names = [site.name for site in unet.sites()]
        rule_of, psi_of = {}, dict.fromkeys(names, 1.0)
        for i, rule in enumerate(self.rules):
            rule_of |= dict.fromkeys(rule.sites or names, i)
        for where, psi in self.psi:
            psi_of |= dict.fromkeys(where or names, psi)
        pairs = sorted({(rule_of[name], psi_of[name]) for name in names})
        vectors, strengths = zip(*(self._vector(unet, *pair) for pair in pairs))
        m = unet.modulation(t, class_vectors=torch.stack(vectors), guidance_scale=guidance_scale)
        if strengths[0] is not None:
            m |= unet.stage_strengths(torch.stack(strengths))
        row = {name: pairs.index((rule_of[name], psi_of[name])) for name in names}
        row |= {stage_of(name): i for name, i in row.items()}  # changes of layers follow the stage's last site
        return {name: type(mod)(*(field[row[name]][None] for field in mod)) for name, mod in m.items()}

    @property
    def class_ids(self) -> list[int]:
        """The classes in the sums."""
        return [class_id for rule in self.rules for class_id, _ in rule.weights]

    def to_dict(self) -> dict:
        """The style as plain JSON types."""
        psi = [{"sites": list(sites or ["*"]), "psi": value} for sites, value in self.psi]
        return {"rules": [rule.to_dict() for rule in self.rules], "psi": psi}

    def _vector(self, unet: AdaGNUNet, rule: int, psi: float) -> tuple[Tensor, Tensor | None]:
        """The vector [class_dim] or [sites, class_dim], and the strength of each learned class's change of layers."""
        ids, weights = zip(*self.rules[rule].weights)
        shift = self.rules[rule].shift
        labels = torch.tensor(ids, device=unet.projection.weight.device)
        vectors, strengths = unet.class_vectors(labels), unet.change_strength(labels)
        weight = torch.tensor(weights, dtype=vectors.dtype, device=vectors.device)
        vector = torch.tensordot(weight, vectors, 1)
        if psi != 1:
            mean = trained_vectors(unet).mean(0)
            vector = mean + psi * (vector - mean)
        if shift is not None:
            vector = vector + shift.to(vector)
        return vector, None if strengths is None else psi * (weight @ strengths)


def example(labels: LabelSpace) -> str:
    """A style of the first classes, such as "cat - dog + truck"."""
    shown = [labels.name(i) for i in range(min(3, labels.K))]
    names = [f"id:{i}" if any(c in name for c in ",@+-*") else name for i, name in enumerate(shown)]
    if len(names) == 3:
        return f"{names[0]} - {names[1]} + {names[2]}"
    return " + ".join(f"{1 / len(names):g}*{name}" for name in names)


def along(text: str, number: int, amount: float) -> str:
    """A style moved along a principal direction at all sites, as text.

    Args:
        text: A style as `Style.parse` reads it.
        number: Of the direction, from 1.
        amount: In standard deviations of the classes.
    """
    if not amount:
        return text
    term = f" {'+' if amount > 0 else '-'} {abs(amount):g}*{DIRECTION}{number}"
    parts = [part.partition("@") for part in text.split(",")]
    return ",".join(f"{expression.rstrip()}{term}{at}{where}" for expression, at, where in parts)


@dataclass(frozen=True)
class Directions:
    """Principal directions of the class vectors.

    Args:
        vectors: float32 [n, class_dim]; each has the length of one standard deviation of the classes.
        share: float64 [n], the share of the variance along each.
        scores: float64 [K, n], where each class lies, in standard deviations.
    """

    vectors: Tensor
    share: Tensor
    scores: Tensor

    def ends(self, index: int, labels: LabelSpace, count: int = 2) -> tuple[list[str], list[str]]:
        """The classes at the low and at the high end of a direction."""
        order = self.scores[:, index].argsort().tolist()
        count = min(count, len(order) // 2)
        return [labels.name(i) for i in order[:count]], [labels.name(i) for i in order[::-1][:count]]


def find_directions(
    unet: AdaGNUNet, process: Process, of: Literal["class", "modulation"] = "class", count: int = MAX_DIRECTIONS
) -> Directions:
    """The directions in which classes differ most, by principal component analysis over the K classes.

    Args:
        unet: A network with a vector for each class.
        process: Its process.
        of: What is analysed. class: the class vectors. modulation: the parameters of all sites, each site divided by its
            standard deviation over the classes, on average over eight noise levels; the direction is then the
            combination of class vectors with the same scores.
        count: The number of directions at most; there are K - 1.

    Raises:
        InputError: The network has no class vectors, or fewer than two classes.
    """
    k = unet.config.num_classes or 0
    if k < 2 or unet.embedding.classes is None:
        raise InputError("directions need a network with vectors of two or more classes.")
    with torch.no_grad():
        vectors = trained_vectors(unet).double().cpu()
        centred = vectors - vectors.mean(0)
        values = centred if of == "class" else _modulation_values(unet, process, k)
        left, singular, _ = torch.linalg.svd(values - values.mean(0), full_matrices=False)
    count = min(count, k - 1)
    left, singular = left[:, :count], singular[:count]
    # a sign that does not depend on the linear algebra library: the class furthest from 0 is at the high end
    left = left * left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    moved = left.T @ centred  # of the class vectors, per unit of the scores
    return Directions(
        (moved / math.sqrt(k)).float(),
        singular.square() / (values - values.mean(0)).square().sum(),
        left * math.sqrt(k),
    )


def _modulation_values(unet: AdaGNUNet, process: Process, k: int) -> Tensor:
    """float64 [K, P]: the parameters of all sites, standardized by site, averaged over noise levels."""
    times = process.quantile((torch.arange(LEVELS).double() + 0.5) / LEVELS)
    total: dict[str, Tensor] = {}
    for time in times.tolist():
        for name, fields in unet.modulation(time, torch.arange(k)).items():
            values = torch.cat([field.flatten(1) for field in fields if field.shape[0] == k], 1).double().cpu()
            total[name] = total.get(name, 0) + values / LEVELS
    centred = [values - values.mean(0) for values in total.values()]
    return torch.cat([values / values.square().mean().sqrt().clamp(min=1e-12) for values in centred], 1)


def trained_vectors(unet: AdaGNUNet) -> Tensor:
    """float [K, class_dim], the vectors of the classes of the training data."""
    return unet.embedding.classes.weight[: unet.config.num_classes]


# ---------------------------------------------------------------------- grammar


def _rule(text: str, labels: LabelSpace, sites: Sequence[Site], directions: Callable[[], Tensor] | None) -> StyleRule:
    expression, at, where = text.rpartition("@")
    if not at:
        expression, where = text, ""
    weights: dict[int, float] = {}
    shifts: list[Tensor] = []
    for sign, term in _terms(expression):
        factor, name = TERM.fullmatch(term).groups()
        weight = sign * float(factor or 1)
        if directions is not None and name.startswith(DIRECTION):
            shifts.append(weight * _direction(name, directions()))
            continue
        try:
            ids = labels.parse(name)
        except InputError as error:
            hint = " A sum has spaces around + and -, and factors such as in 0.5*cat."
            raise InputError(f"{error}{hint if any(c in name for c in '+-*') else ''}") from None
        if len(ids) != 1:
            raise InputError(f"'{name}' names {len(ids)} classes: expected one.")
        weights[ids[0]] = weights.get(ids[0], 0.0) + weight
    total = sum(weights.values())
    if abs(total - 1) > 1e-6:
        raise InputError(
            f"the weights of classes in '{expression.strip()}' add up to {total:g}. Expected 1, such as 0.5*cat + 0.5*dog, or cat - dog + truck."
        )
    names = tuple(s.name for s in sites_at(where.strip(), sites)) if at else None
    return StyleRule(tuple(weights.items()), names, sum(shifts) if shifts else None)


def _direction(name: str, vectors: Tensor) -> Tensor:
    """The vector [class_dim] of a term such as direction:1. vectors: [n, class_dim]."""
    number = name.removeprefix(DIRECTION).strip()
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= len(vectors)):
        raise InputError(f"there is no '{name}': expected direction:1 to direction:{len(vectors)}.")
    return vectors[int(number) - 1]


def _terms(expression: str) -> list[tuple[int, str]]:
    """(sign, term) of each term between + and - with spaces around them."""
    words = re.split(r"\s+([+-])(?:\s+|$)", expression.strip())
    first = words[0]
    sign = -1 if first.startswith("- ") else 1
    terms = [(sign, first.removeprefix("- ").strip())]
    terms += [(1 if s == "+" else -1, term.strip()) for s, term in zip(words[1::2], words[2::2])]
    if not all(term for _, term in terms):
        raise InputError("a class is missing. Expected terms such as cat - dog + truck.")
    return terms
