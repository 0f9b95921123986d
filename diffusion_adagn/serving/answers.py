"""What the HTTP API answers, for its OpenAPI document."""

from typing import Any

from pydantic import BaseModel, Field


class ErrorAnswer(BaseModel):
    """Why a request was not done."""

    error: str = Field(description="one sentence: what was wrong, and what was expected")


class ModelAnswer(BaseModel):
    """A model of the server."""

    name: str
    weights: str = Field(description="where they come from")
    hash: str = Field(description="16 hex digits that identify network and weights")
    classes: int
    null_label: bool = Field(description="whether guidance is possible")
    image_size: int = Field(description="pixels per side")
    channels: int
    conditioning: str
    process: str
    sampler: str = Field(description="used if a request names none")
    spacing: str
    trained_steps: int | None


class ClassAnswer(BaseModel):
    """A class."""

    id: int
    name: str


class ClassesAnswer(BaseModel):
    """The classes of a model."""

    model: str
    classes: list[ClassAnswer]
    null_id: int | None = Field(description="id of the null label, which samples without a class")


class ImageAnswer(BaseModel, extra="allow"):
    """An image and all that is needed to sample it again."""

    class_id: int | None
    class_name: str
    seed: int
    guidance: float = Field(description="guidance scale")
    sampler: str
    steps: int
    model_hash: str
    png: str = Field(description="the image, a PNG file in base64")
    strip: list[str] = Field(default=[], description="predicted images on the way, the noisiest first, as png")


class ImagesAnswer(BaseModel):
    """Images with their record. PNG answers have the record, without images, as the text 'adagn' in the file."""

    model: ModelAnswer
    command: str = Field(description="the command that samples the same images")
    images: list[ImageAnswer]
    mixes: dict[str, str] = Field(default={}, description="of each mix, the sites that each rule applies to")


class CheckAnswer(BaseModel):
    """Whether a model uses its label."""

    model: str
    used: bool | None = Field(description="null: cannot be decided")
    sentence: str


class HealthAnswer(BaseModel):
    """That the server answers."""

    status: str
    version: str
    models: list[str]


class ModulationAnswer(BaseModel, extra="allow"):
    """What the modulation says about a model or a class."""

    model: str
    sentences: list[str]
    nearest_classes: Any
