"""The tools for agents, called by the official MCP client over HTTP and over stdio."""

import asyncio
import base64
import json
import socket
import sys

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("mcp", reason="the extra serve is not installed")

import httpx2
import mcp
from mcp.client.streamable_http import streamable_http_client
from served import pixels, running

from benchmarks.digits_judge import DigitsJudge
from diffusion_adagn.serving.agents import MIN_SIDE
from examples import agent

TOOLS = {"list_models", "list_classes", "sample_images", "mix_classes", "explain_class"}


@pytest.fixture(scope="module")
def server():
    with running(["digits"]) as client:
        yield client


def talk(target, *calls, progress=None):
    """The results of some tool calls in one session, after the names of the tools."""

    async def session():
        async with mcp.Client(target) as client:
            tools = await client.list_tools()
            return tools.tools, [await client.call_tool(n, a, progress_callback=progress) for n, a in calls]

    return asyncio.run(session())


def ask(server, *calls, **more):
    return talk(f"http://127.0.0.1:{server.port}/mcp", *calls, **more)[1]


def images_of(result):
    assert not result.is_error, result.content
    return [pixels(base64.b64decode(one.data)) for one in result.content if one.type == "image"]


def native(image):
    """An image of 8 pixels per side from its enlargement, which must be by a whole factor without smoothing."""
    factor = image.shape[0] // 8
    small = image[::factor, ::factor]
    assert np.array_equal(small.repeat(factor, 0).repeat(factor, 1), image)
    return small


def check_three(result):
    """That a result has one image of class 3, and its record."""
    (image,) = images_of(result)
    assert image.shape[:2] == (MIN_SIDE, MIN_SIDE)
    assert DigitsJudge().classes(native(image)[None] / 255).tolist() == [3]
    record = json.loads(result.content[-1].text)
    assert record["images"][0]["class_name"] == "3" and record["command"].startswith("adagn sample")


def test_http_client_receives_an_image_of_the_class(server):
    tools, (result,) = talk(f"http://127.0.0.1:{server.port}/mcp", ("sample_images", {"classes": "3", "steps": 10}))
    assert {tool.name for tool in tools} == TOOLS
    assert all(tool.description and tool.input_schema["type"] == "object" for tool in tools)
    sample = next(tool for tool in tools if tool.name == "sample_images").input_schema
    assert sample["required"] == ["classes"] and "description" in sample["properties"]["guidance_scale"]
    check_three(result)


@pytest.mark.slow
@pytest.mark.serial
def test_stdio_client_receives_an_image_of_the_class():
    program = mcp.StdioServerParameters(command=sys.executable, args=["-m", "diffusion_adagn", "mcp", "digits"])
    tools, (result, wrong) = talk(
        program, ("sample_images", {"classes": "3", "steps": 10}), ("sample_images", {"classes": "zebra"})
    )
    assert {tool.name for tool in tools} == TOOLS
    check_three(result)
    assert wrong.is_error and "there is no class 'zebra'" in wrong.content[0].text


def test_tools_describe_models_and_classes(server):
    models, classes = ask(server, ("list_models", {}), ("list_classes", {"model": "digits"}))
    assert json.loads(models.content[0].text)[0]["name"] == "digits"
    assert json.loads(classes.content[0].text)["classes"][3]["name"] == "3"


def test_mixed_image_is_that_of_the_pipeline(server):
    given = {"mix": "3@coarse,8@fine", "steps": 5, "guidance_scale": 1, "seed": 4}
    (result,) = ask(server, ("mix_classes", given))
    (image,) = images_of(result)
    pipe = server.models["digits"].pipe
    expected = pipe(class_plan="3@coarse,8@fine", num_inference_steps=5, seeds=[4], output_type="np").images[0]
    assert np.abs(native(image) - (expected * 255).round()).max() <= 1
    assert "3@coarse: 5 of 8 sites" in json.loads(result.content[-1].text)["mixes"]["3@coarse,8@fine"]


def test_explained_class_has_a_drawing(server):
    (result,) = ask(server, ("explain_class", {"class_name": "3"}))
    (drawing,) = images_of(result)
    assert drawing.shape[1] > 500 and np.unique(drawing.reshape(-1, drawing.shape[2]), axis=0).shape[0] > 3
    assert json.loads(result.content[-1].text)["class_name"] == "3"


def test_progress_reaches_the_client(server):
    seen = []

    async def note(done, total, message):
        seen.append((done, total))

    ask(server, ("sample_images", {"classes": "3", "steps": 30, "count": 8}), progress=note)
    assert (
        seen and {total for _, total in seen} == {30} and [done for done, _ in seen] == sorted(done for done, _ in seen)
    )


@pytest.mark.parametrize(
    ("tool", "given", "said"),
    [
        ("sample_images", {"classes": "zebra"}, "there is no class 'zebra'"),
        ("sample_images", {}, "classes: is missing."),
        ("sample_images", {"classes": "3", "steps": 0}, "steps: must be at least 1, got 0."),
        ("sample_images", {"classes": "3", "count": 99}, "count: must be at most 16, got 99."),
        ("sample_images", {"classes": "3", "steps": 99}, "more than the limit of 60 per request: set steps to 60"),
        ("sample_images", {"classes": "3", "guidance": 2}, "no argument 'guidance'. Did you mean guidance_scale?"),
        ("list_models", {"x": 1}, "there is no argument 'x'."),
        ("sample_images", {"classes": "3", "model": "../../etc/passwd"}, "there is no model '../../etc/passwd'"),
        ("mix_classes", {"mix": "3@coarse"}, "no rule covers"),
        ("explain_class", {"class_name": "3,8"}, "class_name is one class"),
        ("no_such_tool", {}, "no_such_tool"),
    ],
)
def test_wrong_call_is_answered_in_one_sentence(server, tool, given, said):
    (result,) = ask(server, (tool, given))
    text = result.content[0].text
    assert result.is_error and said in text and "\n" not in text and "pydantic" not in text


def test_classes_may_be_a_number_or_a_list(server):
    number, several = ask(
        server, ("sample_images", {"classes": 3, "steps": 1}), ("sample_images", {"classes": ["3", 8], "steps": 1})
    )
    assert (len(images_of(number)), len(images_of(several))) == (1, 2)


def test_example_without_a_server_says_what_to_start(capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}/mcp"
    error = agent.main(["--server", address])
    assert f"no server answers at {address}" in error and "adagn serve digits" in error


def test_client_sends_the_token_as_a_header():
    async def names(address, headers):
        http = httpx2.AsyncClient(headers=headers)
        async with http, mcp.Client(streamable_http_client(address, http_client=http)) as client:
            return {tool.name for tool in (await client.list_tools()).tools}

    with running(["digits"], token="secret-of-the-test") as server:
        address = f"http://127.0.0.1:{server.port}/mcp"
        assert asyncio.run(names(address, {"Authorization": "Bearer secret-of-the-test"})) == TOOLS
        with pytest.raises(Exception):  # noqa: B017 - a group of the client's errors
            asyncio.run(names(address, {}))


def test_cancelled_call_frees_the_worker(server):
    worker = server.models["digits"].worker

    async def session():
        async with mcp.Client(f"http://127.0.0.1:{server.port}/mcp") as client:
            given = {"classes": "all", "count": 2, "steps": 60, "guidance_scale": 3}
            call = asyncio.create_task(client.call_tool("sample_images", given))
            while not worker.running:
                await asyncio.sleep(0.01)
            (job,) = worker.running
            call.cancel()
            while worker.running:
                await asyncio.sleep(0.01)
            return job

    job = asyncio.run(asyncio.wait_for(session(), 60))
    assert job.steps_done < 60 and job.future.exception() is not None
