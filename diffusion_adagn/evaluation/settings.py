"""The settings of measurements, and of `adagn evaluate`. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import BeforeValidator, model_validator

from ..config import Device, Precision
from ..errors import InputError
from ..renamed import extractor_name
from ..sampling.settings import Ema, GuideEma, Numbers, SamplerSettings, scales_of
from ..schema import AS_GIVEN, NO_OPTION, Option, settings


def _renamed(extractor: Any) -> Any:
    return extractor_name(extractor) if isinstance(extractor, str) else extractor


@settings(frozen=True)
class EvalConfig:
    """What is sampled, and what it is measured with and against."""

    classes: Annotated[str | None, AS_GIVEN, Option(default="all")] = None
    """names, ids, 'all' or files of learned classes, with commas between"""
    count: Annotated[int, Ge(1)] = 1000
    """images per setting, over all classes together"""
    seed: Annotated[int, Ge(0)] = 0
    """image i starts from the noise of seed + i"""
    against: Annotated[
        str | None, Option(metavar="NAME_OR_PATH[:split]", default="the training part of the run's data")
    ] = None
    """the reference images"""
    data: Annotated[dict[str, Any], NO_OPTION] = field(default_factory=dict)
    """settings of the reference images, by dotted key of a run's config"""
    extractor: Annotated[str, BeforeValidator(_renamed), Option(metavar="SPEC")] = "classifier"
    """network whose features are compared: classifier (trained on your data at first use; shipped for CIFAR-10), sklearn
    (images up to 16x16), inception[:WEIGHTS] (the network of FID), dinov2:PATH, efficientnet:PATH, package.module:attribute,
    none (no metric)"""
    classifier: Literal["auto", "none"] = "auto"
    """auto: if the extractor does not know the classes, a classifier of your data measures accuracy"""
    reference_count: Annotated[int, Ge(1)] = 10_000
    """maximum number of reference images"""
    k: Annotated[int, Ge(1)] = 5
    """number of neighbours for precision, recall, density, coverage"""
    batch_size: Annotated[int, Ge(1)] = 64
    """images per batch"""
    precision: Precision = "auto"
    """autocast type of the network; auto: bf16 on a CUDA GPU that supports it, else fp32, and in an existing sweep its
    first type; tf32: fp32 with matrix products and convolutions in TF32 (CUDA)"""
    device: Device = "auto"

    @property
    def own_data(self) -> bool:
        """Whether the reference images are those of the run."""
        return self.against is None and "data.source" not in self.data


@settings(frozen=True)
class EvaluateRequest(EvalConfig):
    """What `adagn evaluate` measures. `sampler` applies to models; the scale also selects images of a folder."""

    scales: Annotated[Numbers | None, Option("guidance", "NUMBER", "1")] = None
    """guidance scale; 1 is no guidance. Of a folder of images with several scales: which of them"""
    w: Annotated[Numbers | None, Option(metavar="NUMBER")] = None
    """w of the classifier-free guidance paper (scale - 1), instead of --guidance"""
    sampler: SamplerSettings = SamplerSettings()
    ema: Ema = "run"
    guide_ema: GuideEma = None
    neighbours: Annotated[int, Ge(0)] = 8
    """rows of the sheet of real images that are nearest to sampled ones; 0: no sheet"""
    keep: bool = False
    """save the sampled images as samples.npz, for the ADM evaluator"""
    overwrite: bool = False
    """replace the evaluation in the folder, or the file"""
    command: Annotated[str, NO_OPTION] = ""
    """the command line, for messages and the report"""

    @model_validator(mode="after")
    def _check_scale(self) -> EvaluateRequest:
        several = len(scales_of(self.scales, self.w)) > 1
        if self.extractor == "none":
            looks = "adagn sweep --extractor none gives the looks alone"
            raise InputError(f"without an extractor there is nothing to evaluate; {looks}.")
        if several:
            raise InputError("--guidance takes one scale here; adagn sweep measures several, side by side.")
        return self

    @property
    def scale(self) -> float | None:
        """The guidance scale that was given, if any."""
        return None if self.scales is None and self.w is None else scales_of(self.scales, self.w)[0]
