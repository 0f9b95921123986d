"""What a request samples, image by image, and what is recorded of each: the same for `adagn sample` and the server."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..config import SpeedConfig
from ..errors import InputError
from .class_mix import ClassInterpolation, ClassMix, ClassPlan
from .pipeline import ClassConditionalPipeline
from .settings import SampleRequest, SamplerSettings
from .style import Style

DEFAULT_STEPS_BETWEEN = 7


@dataclass(frozen=True)
class PlannedImage:
    """One image to sample."""

    index: int
    plan: ClassPlan
    seed: int
    scale: float
    file: str


def plans_of(request: SampleRequest, pipe: ClassConditionalPipeline) -> list[ClassPlan]:
    """The classes, then the mixes and styles; or the interpolation steps. Raises InputError for an unknown class or place."""
    labels = pipe.labels
    if request.interpolate is not None:
        last = (DEFAULT_STEPS_BETWEEN if request.steps_between is None else request.steps_between) + 1
        return [ClassInterpolation.parse(request.interpolate, labels, i / last) for i in range(last + 1)]
    alone = not request.mixes and not request.styles
    classes = request.classes or ("all" if labels.K else "null") * alone
    ids = labels.parse(classes) if classes else []
    styles = [pipe.style(text, request.psi) for text in request.styles]
    if request.psi is None:
        return [*(ClassMix.single(c, labels) for c in ids), *(pipe.mix(text) for text in request.mixes), *styles]
    if pipe.unet.embedding.classes is None:
        raise InputError("--psi truncates class vectors, and this model has none: leave it out.")
    sites = pipe.unet.sites()
    return [*(Style.of_class(c, labels).truncated(request.psi, sites) for c in ids), *styles]


def planned_images(request: SampleRequest, plans: list[ClassPlan]) -> Iterator[PlannedImage]:
    """Every image, scale by scale, class-major within a scale."""
    for scale in request.scales:
        for row, one in enumerate(plans):
            name = one.name if one.class_id is None else one.name.split(",")[0]
            slug = re.sub(r"[^\w-]+", "-", name).strip("-")[:40] or "class"
            for j in range(request.count):
                i = row * request.count + j
                seed = request.seed + (j if request.same_seeds else i)
                yield PlannedImage(i, one, seed, scale, f"{i:05d}-{slug}-g{repr(scale).removesuffix('.0')}.png")


def image_record(
    image: PlannedImage, sampler: SamplerSettings, speed: SpeedConfig, network_calls: int, model_hash: str
) -> dict:
    """What is recorded of an image: with the model of this hash it can be sampled again. sampler: resolved."""
    return {
        "class_id": image.plan.class_id,
        "class_name": image.plan.name,
        "seed": image.seed,
        "guidance": image.scale,
        **sampler.guidance.to_dict(),
        "guide": sampler.guide,
        "sampler": sampler.sampler,
        "steps": sampler.steps,
        "spacing": sampler.spacing,
        "eta": sampler.eta,
        "network_calls": network_calls,
        "precision": speed.precision,
        "layout": speed.memory_format,
        "operator": speed.operator,
        "model_hash": model_hash,
    }
