"""What a browser sees at /: the page of extra [ui], or how to install it."""

import os
from html import escape
from importlib.util import find_spec

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from ..actions import Models

MISSING = """\
<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>diffusion_adagn</title>
<body style="font: 16px/1.5 system-ui, sans-serif; max-width: 40em; margin: 3em auto; padding: 0 1em">
<h1>diffusion_adagn</h1>
<p>This server samples {models}.</p>
<ul><li>API: <a href="/v1/models">/v1/models</a>, described in <a href="/openapi.json">/openapi.json</a></li>
<li>Tools for agents (MCP): /mcp</li></ul>
<p>The page with buttons and images needs the extra <code>ui</code>: <code>pip install 'diffusion-adagn[ui]'</code></p>
</body></html>
"""


def mount_page(app: FastAPI, models: Models) -> None:
    """Put the page at /, after all other routes.

    Args:
        app: the application, which has the API.
        models: by name.
    """
    if find_spec("gradio") is not None:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it on import, and asks the network otherwise
        from .build import mount

        mount(app, models)
        return
    text = MISSING.format(models=escape(", ".join(models)))

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text)
