"""The models that are part of the package, by name. This module imports without torch.

Each is a run folder without checkpoints: pretrained/NAME/config.yaml, pipeline/ and README.md, the record of how it was
made.
"""

from pathlib import Path

FOLDER = Path(__file__).parent.parent / "pretrained"


def shipped_models() -> list[str]:
    """The names of the shipped models, sorted."""
    return sorted(file.parent.name for file in FOLDER.glob("*/config.yaml"))


def shipped_folder(source: str | Path) -> Path | None:
    """The run folder of the shipped model that a name means; None for all else, and if a path of that name exists."""
    if str(source) not in shipped_models() or Path(source).exists():
        return None
    return FOLDER / str(source)


def model_folder(source: str | Path) -> Path:
    """The folder that a model's name or path means; every function that reads a model calls this one."""
    return shipped_folder(source) or Path(source)
