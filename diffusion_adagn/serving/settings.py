"""The settings of a server, and what its clients can ask for. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import AfterValidator, BeforeValidator, model_validator

from ..config import SpeedConfig
from ..errors import InputError
from ..sampling.settings import Ema, Numbers, SampleRequest, SamplerSettings
from ..schema import AS_GIVEN, Option, settings

LOOPBACK = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = ("0.0.0.0", "::")  # all addresses of this machine
MIN_TOKEN = 8  # characters
MAX_BODY = 2**18  # bytes of a request
MAX_TEXT = 4000  # characters of a list of classes; the time to read a mix grows with the square of its length
MAX_MIX = 500


@settings(frozen=True)
class Limits:
    """What one client can take from the others."""

    max_batch: Annotated[int, Ge(1)] = 64
    """images that are sampled together"""
    max_images: Annotated[int, Ge(1)] = 64
    """images per request"""
    max_steps: Annotated[int, Ge(1)] = 250
    """sampler steps per request"""
    max_waiting: Annotated[int, Ge(1)] = 32
    """requests that wait for one model; further ones get status 429"""
    max_seconds: Annotated[float, Ge(0.1), Le(86400)] = 120.0
    """seconds per request, waiting included; then it gets status 504"""


@settings(frozen=True)
class ModelSettings:
    """How models are loaded and how much they may be asked for."""

    limits: Limits = Limits()
    ema: Ema = "run"
    learned: Annotated[tuple[str, ...], Option("learned", "FILE")] = ()
    """a learned class (adagn learn-class), for the models of its run; may be given again"""
    speed: SpeedConfig = field(default_factory=SpeedConfig)


def _checked_token(token: str) -> str:
    if len(token) < MIN_TOKEN:
        raise ValueError(f"a token of {MIN_TOKEN} characters or more is required, and this one has {len(token)}")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("has characters that a header cannot carry: use letters, digits, - and _")
    return token


@settings(frozen=True)
class ServeRequest(ModelSettings):
    """What `adagn serve` starts."""

    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 is all of this machine's, under all of its names, and needs a token"""
    port: Annotated[int, Ge(0), Le(65535)] = 7860
    """port to listen on; 0 is any free one"""
    token: Annotated[
        Annotated[str, AfterValidator(_checked_token)] | None,
        AS_GIVEN,
        Option(default="the environment variable ADAGN_TOKEN"),
    ] = None
    """secret that clients send, of 8 characters or more"""
    allowed_hosts: Annotated[tuple[str, ...], Option("allowed_host", "NAME")] = ()
    """a name under which clients may reach the server, besides the loopback names and --host; may be given again"""

    @model_validator(mode="after")
    def _check_token(self) -> ServeRequest:
        if self.host not in LOOPBACK and self.token is None:
            text = f"--host {self.host} can be reached from other machines: give a secret of {MIN_TOKEN} characters or more"
            raise InputError(f"{text}, --token TEXT, or leave out --host.")
        return self


@settings(frozen=True)
class ModelQuery:
    """Which model."""

    model: Annotated[str | None, AS_GIVEN, MaxLen(MAX_TEXT)] = None
    """name of a model; null: the first one"""


@settings(frozen=True)
class ImagesQuery(ModelQuery):
    """What the requests for images have in common."""

    count: Annotated[int, Ge(1)] = 1
    """images per class, mix or step, and guidance scale"""
    seed: Annotated[int, Ge(0)] = 0
    """seed of the first noise; image i of sample has seed + i, of mix and interpolate image j of each row seed + j"""
    scales: Annotated[Numbers | None, MaxLen(100)] = None
    """guidance scales, each from the same noises; 1 is no guidance. null: sampler.guidance.scale"""
    sampler: SamplerSettings = SamplerSettings()
    """how to sample; `guide` is the name of another model of this server"""
    strip: Annotated[int, Ge(0), Le(8)] = 0
    """predicted images (x0) on the way from noise to image, evenly spread over the steps, per image"""

    def planned(self) -> dict:
        """The part of the request that says what to sample, as arguments of SampleRequest."""
        raise NotImplementedError

    def request(self) -> SampleRequest:
        """The request as `adagn sample` has it. Raises InputError if scales and sampler.guidance.scale differ."""
        scale = self.sampler.guidance.scale
        scales = self.scales or (scale if isinstance(scale, tuple) else (scale,))
        if self.scales is not None and scale not in (1, self.scales):
            raise InputError("scales and sampler.guidance.scale both set the guidance scale: give one of them.")
        shared = {"count": self.count, "seed": self.seed, "scales": scales}
        return SampleRequest(sampler=self.sampler.at_scale(1.0), **shared, **self.planned())


def joined(value: Any) -> Any:
    """A list of words and numbers as text with commas between, a number as text; anything else unchanged."""
    words = value if isinstance(value, list | tuple) else [value]
    if words and all(isinstance(word, str | int) and not isinstance(word, bool) for word in words):
        return ",".join(map(str, words))
    if isinstance(value, str | None):
        return value
    raise ValueError('expected text with commas, such as "3,8", or a list of words and numbers')


@settings(frozen=True)
class SampleQuery(ImagesQuery):
    """Images of classes."""

    classes: Annotated[str | None, AS_GIVEN, MaxLen(MAX_TEXT), BeforeValidator(joined)] = None
    """names, ids, 'all' or 'null', with commas between; null: all"""

    def planned(self) -> dict:
        return {"classes": self.classes}


Mix = Annotated[str, AS_GIVEN, MinLen(1), MaxLen(MAX_MIX)]


def _as_mixes(value: Any) -> Any:
    """One mix as a list of it."""
    return _as_texts(value, "3@coarse,8@fine")


def _as_styles(value: Any) -> Any:
    """One sum as a list of it."""
    return _as_texts(value, "0.5*3 + 0.5*8")


def _as_texts(value: Any, example: str) -> Any:
    if not isinstance(value, str | list | tuple):
        raise ValueError(f'expected texts, such as ["{example}"]')
    return [value] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    """A number as text."""
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


@settings(frozen=True, kw_only=True)
class MixQuery(ImagesQuery):
    """Images of several classes each, by layer or noise level."""

    mixes: Annotated[tuple[Mix, ...], AS_GIVEN, MinLen(1), MaxLen(16), BeforeValidator(_as_mixes)]
    """such as ["3@coarse,8@fine"]: rules CLASS@WHERE; a class without @ is the default. WHERE: coarse, fine, a
    resolution (8, 8x8, <=8, >8), depth<10, down, middle, up, a noise level (sigma>2), or several joined by &"""

    def planned(self) -> dict:
        return {"mixes": self.mixes}


@settings(frozen=True, kw_only=True)
class InterpolateQuery(ImagesQuery):
    """Images from one class to another; each row starts from one noise."""

    between: Annotated[str, AS_GIVEN, MinLen(1), MaxLen(MAX_MIX), BeforeValidator(joined)]
    """two classes, such as 3,8"""
    steps_between: Annotated[int, Ge(0), Le(1000)] = 7
    """images between the two"""

    def planned(self) -> dict:
        return {"interpolate": self.between, "steps_between": self.steps_between}


@settings(frozen=True, kw_only=True)
class StyleQuery(ImagesQuery):
    """Images of sums of class vectors; each row starts from the same noises."""

    styles: Annotated[tuple[Mix, ...], AS_GIVEN, MinLen(1), MaxLen(16), BeforeValidator(_as_styles)]
    """such as ["3 - 1 + 7", "0.5*3 + 0.5*8"]: weights add up to 1; "3 + 1.5*direction:1" moves along a principal direction;
    a sum with @WHERE, after a comma, changes some sites"""
    psi: Annotated[str | None, AS_GIVEN, MaxLen(MAX_MIX), BeforeValidator(_as_text)] = None
    """truncation: 0 is the mean of all classes, 1 and null change nothing; or by site: "coarse:0.5,fine:1" """

    def planned(self) -> dict:
        return {"styles": self.styles, "psi": self.psi}


@settings(frozen=True)
class ClassQuery(ModelQuery):
    """A class of a model."""

    class_name: Annotated[str | None, AS_GIVEN, MaxLen(MAX_TEXT), BeforeValidator(joined)] = None
    """name or id of a class; null: all classes"""
