"""What a browser sees at /."""

from html import escape

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from .actions import Models

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
    """Put the page at /. The page of extra [ui] will be mounted here.

    Args:
        app: the application, which has the API.
        models: by name.
    """
    text = MISSING.format(models=escape(", ".join(models)))

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text)
