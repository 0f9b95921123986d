"""Saved reports of traces, evaluations and sweeps, each under an address of its own, without scripts and without requests to anywhere."""

from urllib.parse import quote

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from .folders import Folders

REPORTS = "/reports"
HEADERS = {
    "content-security-policy": "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
}


def address(model: str, name: str) -> str:
    """Where a report is served."""
    return f"{REPORTS}/{quote(model, safe='')}/{quote(name, safe='')}"


def add_reports(app: FastAPI, folders: dict[str, Folders]) -> None:
    """The route of the reports that were found at start.

    Args:
        app: the application.
        folders: of each model.
    """

    @app.get(f"{REPORTS}/{{model}}/{{name}}", include_in_schema=False)
    async def report(model: str, name: str) -> FileResponse:
        file = folders[model].reports.get(name) if model in folders else None
        if file is None or not file.is_file():
            raise HTTPException(404)
        return FileResponse(file, media_type="text/html", headers=HEADERS)
