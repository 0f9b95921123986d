"""The tools for agents (MCP): a thin front of `actions`. Images come back as images that the agent sees."""

import base64
import json
from collections.abc import Callable
from typing import Annotated, Any

import anyio
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, ImageContent, TextContent, Tool
from pydantic import BeforeValidator, Field, ValidationError

from ..errors import InputError, did_you_mean
from ..render import figures
from ..schema import Layer, Problem, build, short_repr
from ..version import __version__
from . import actions
from .actions import Models
from .explain import draw_class
from .images import Images, png
from .models import find
from .settings import ClassQuery, ImagesQuery, MixQuery, ModelQuery, SampleQuery, joined
from .waiting import progress_of, result_of
from .worker import Job, Unavailable

MIN_SIDE = 128  # px; smaller images are enlarged by a whole factor
INSTRUCTIONS = (
    "Generates images of the classes of trained class-conditional diffusion models. list_models and list_classes say "
    "what there is. The same class, seed and settings give the same image."
)
ModelName = Annotated[str | None, Field(description="name of a model, from list_models; by default the first one")]
Count = Annotated[int, Field(ge=1, le=16, description="images of each")]
Seed = Annotated[int, Field(ge=0, description="seed of the first image; the same seed gives the same image")]
Scale = Annotated[
    float,
    Field(
        ge=0, le=20, description="guidance scale: 1 is none, 2 to 4 follow the class more closely, with less variety"
    ),
]
Steps = Annotated[int, Field(ge=1, description="sampler steps")]


class AgentServer(MCPServer):
    """An MCPServer that rejects unknown arguments, and whose errors are one sentence, without a traceback."""

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Context | None = None) -> Any:
        """See `MCPServer`."""
        for known in [_arguments(tool) for tool in await self.list_tools() if tool.name == name]:
            if unknown := next((argument for argument in arguments if argument not in known), None):
                hint = did_you_mean(unknown[:80], known, most=1) or f" Arguments: {', '.join(known) or 'none'}."
                raise ToolError(f"there is no argument {short_repr(unknown)}.{hint}")
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            cause = error.__cause__
            if isinstance(cause, InputError | Unavailable):
                raise ToolError(str(cause)) from None
            if isinstance(cause, ValidationError):
                problem = Problem.of(cause, None)
                raise ToolError(f"{problem.key}: {problem.message}.{problem.hint}") from None
            raise


def make_agent_server(models: Models) -> AgentServer:
    """The tools.

    Args:
        models: by name.
    """
    server = AgentServer("diffusion_adagn", instructions=INSTRUCTIONS, version=__version__, log_level="WARNING")
    tool = server.tool(structured_output=False)

    @tool
    async def list_models() -> CallToolResult:
        """List the models: name, number of classes, size of the images, process, default sampler."""
        return _text(actions.list_models(models))

    @tool
    async def list_classes(model: ModelName = None) -> CallToolResult:
        """List the classes of a model by id and name."""
        return _text(actions.list_classes(models, ModelQuery(model=model)))

    @tool
    async def sample_images(
        classes: Annotated[
            str,
            BeforeValidator(joined),
            Field(description="names or ids with commas between, such as '3' or 'cat,dog'; all; null"),
        ],
        ctx: Context,
        count: Count = 1,
        seed: Seed = 0,
        guidance_scale: Scale = 2.0,
        steps: Steps = 20,
        model: ModelName = None,
    ) -> CallToolResult:
        """Generate images of classes. Returns the images, and a record with the seed and settings of each."""
        given = {"classes": classes, "count": count, "seed": seed, "model": model}
        return await _images(ctx, models, SampleQuery, guidance_scale, steps, given)

    @tool
    async def mix_classes(
        mix: Annotated[
            str,
            Field(
                description="rules CLASS@WHERE with commas between, such as '3@coarse,8@fine': the coarse layers "
                "receive class 3, the fine ones 8. WHERE: coarse, fine, a resolution (8, <=8, >8), depth<10, down, "
                "middle, up, a noise level (sigma>2), or several joined by &; a class without @ is the default"
            ),
        ],
        ctx: Context,
        count: Count = 1,
        seed: Seed = 0,
        guidance_scale: Scale = 2.0,
        steps: Steps = 20,
        model: ModelName = None,
    ) -> CallToolResult:
        """Generate images whose layers receive different classes. Returns the images, and a record with the rules."""
        given = {"mixes": (mix,), "count": count, "seed": seed, "model": model}
        return await _images(ctx, models, MixQuery, guidance_scale, steps, given)

    @tool
    async def explain_class(
        class_name: Annotated[str, BeforeValidator(joined), Field(description="name or id of a class")],
        model: ModelName = None,
    ) -> CallToolResult:
        """Show how a class is represented: where in the network it differs from the others, and which are alike."""
        job = await _run(actions.modulation, models, ClassQuery(model=model, class_name=class_name))
        explained = await result_of(job)
        chart = await anyio.to_thread.run_sync(draw_class, find(models, model).atlas, explained)
        return _result([_image(figures.png(chart))], explained)

    return server


def _arguments(tool: Tool) -> list[str]:
    return list(tool.input_schema.get("properties", {}))


async def _run(action: Callable, models: Models, query: ModelQuery) -> Job:
    return await anyio.to_thread.run_sync(action, models, query)


async def _images(
    ctx: Context, models: Models, kind: type[ImagesQuery], scale: float, steps: int, given: dict[str, Any]
) -> CallToolResult:
    """Sample, and report the steps to the client meanwhile."""
    labels = {"scales": "guidance_scale", "sampler.steps": "steps", "mixes": "mix"}
    query = build(kind, Layer({**given, "scales": (scale,), "sampler.steps": steps}, labels=labels))
    job = await _run(actions.images, models, query)
    async for done in progress_of(job):
        await ctx.report_progress(done, job.steps)
    images: Images = await result_of(job)
    pngs = await anyio.to_thread.run_sync(lambda: [png(pixels, min_side=MIN_SIDE) for pixels in images.pixels])
    return _result([_image(one) for one in pngs], images.record)


def _image(data: bytes) -> ImageContent:
    return ImageContent(type="image", data=base64.b64encode(data).decode(), mime_type="image/png")


def _text(value: Any) -> CallToolResult:
    return _result([], value)


def _result(images: list[ImageContent], value: Any) -> CallToolResult:
    text = json.dumps(value, ensure_ascii=False)
    return CallToolResult(content=[*images, TextContent(type="text", text=text)])
