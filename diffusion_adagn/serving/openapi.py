"""Corrections of the OpenAPI document that FastAPI makes of classes of settings."""

from typing import Any

SIZES = {"maxLength": "maxItems", "minLength": "minItems"}  # pydantic's names of an array's limits under a union


def corrected(node: Any) -> Any:
    """The document, changed in place: limits of arrays by their names, and defaults that are null.

    Args:
        node: a document or a part of it.

    Returns:
        The same document.
    """
    if isinstance(node, list):
        for part in node:
            corrected(part)
    elif isinstance(node, dict):
        if node.get("type") == "array":
            for wrong, right in SIZES.items():
                if wrong in node:
                    node[right] = node.pop(wrong)
        if "$ref" in node:  # a section has the defaults of its settings
            node.pop("default", None)
        for name, part in node.get("properties", {}).items() if isinstance(node.get("properties"), dict) else ():
            if name not in node.get("required", ()) and "default" not in part and "$ref" not in part:
                part["default"] = None
                if "anyOf" not in part:  # such as the text of an interval
                    part["anyOf"] = [{"type": part.pop("type")}, {"type": "null"}]
        for part in node.values():
            corrected(part)
    return node
