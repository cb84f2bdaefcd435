"""Paths: where a service has what."""

from urllib.parse import quote

CAPTURES = "/v1/captures"


def capture_path(name: str) -> str:
    return f"{CAPTURES}/{quote(name, safe='')}"


def label_path(capture: str, label: str) -> str:
    return f"{capture_path(capture)}/labels/{quote(label, safe='')}"
