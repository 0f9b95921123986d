"""A chat that generates images: python examples/agent.py "Draw me a three, please" (a server must run: adagn serve digits).

`--server http://127.0.0.1:7000/mcp` names another server.

The program lists the server's tools, lets `choose` select one for each message, and saves the images that come back. In a real
agent a language model takes the place of `choose`: it receives the messages and the tools' JSON schemas, and answers with
the name of a tool and its arguments.
"""

import argparse
import asyncio
import base64
import re
import sys
from pathlib import Path

from mcp import Client

SERVER = "http://127.0.0.1:7860/mcp"
WORDS = {
    word: str(i)
    for i, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
}


def choose(message: str, classes: list[str]) -> tuple[str, dict]:
    """A tool and its arguments for a message: the stand-in for a language model."""
    words = [WORDS.get(word, word) for word in re.findall(r"\w+", message.lower())]
    named = [name for name in dict.fromkeys(words) if name in classes]
    if len(named) == 2 and ("mix" in words or "between" in words):
        return "mix_classes", {"mix": f"{named[0]}@coarse,{named[1]}@fine"}
    if named and ("why" in words or "explain" in words):
        return "explain_class", {"class_name": named[0]}
    return "sample_images", {"classes": ",".join(named) or "all", "guidance_scale": 2, "steps": 20}


async def answer(client: Client, message: str, folder: Path) -> list[Path]:
    """Call a tool for a message, print its text, and save its images."""
    listed = await client.call_tool("list_classes", {})
    classes = re.findall(r'"name": "([^"]+)"', listed.content[0].text)
    tool, arguments = choose(message, classes)
    print(f"calls {tool} with {arguments}")
    result = await client.call_tool(tool, arguments)
    files = []
    for content in result.content:
        if content.type == "image":
            files.append(folder / f"agent_{len(list(folder.glob('agent_*.png')))}.png")
            files[-1].write_bytes(base64.b64decode(content.data))
        else:
            print(content.text[:400])
    return files


async def chat(messages: list[str], server: str = SERVER, folder: Path = Path()) -> list[Path]:
    """Answer each message. Returns the images' files."""
    async with Client(server) as client:
        tools = await client.list_tools()
        print(f"tools: {', '.join(tool.name for tool in tools.tools)}")
        files = [file for message in messages for file in await answer(client, message, folder)]
    print(f"Look at  {', '.join(map(str, files)) or 'nothing: no image came back'}")
    return files


def main(argv: list[str]) -> str | None:
    """Run the chat. Returns an error, if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("message", nargs="*", default=["Draw me a three, please"])
    parser.add_argument("--server", default=SERVER, metavar="URL", help=f"address of its tools [{SERVER}]")
    args = parser.parse_args(argv)
    try:
        asyncio.run(chat(args.message, args.server))
    except Exception as error:  # the client's errors have many types, in groups
        return f"no server answers at {args.server} ({type(error).__name__}): start one with `adagn serve digits`, or name another with --server."
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
