"""JSON documents that carry the crc32c of their own text."""

import json
from typing import Any

from crc32c import crc32c

from hiddenlake.cache.errors import CorruptError


def parse(raw: bytes) -> Any:
    """JSON from a file. Raises ValueError."""
    try:
        return json.loads(raw)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def to_json_bytes(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"


def sign(body: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the crc32c of its canonical text beside its fields."""
    return body | {"crc32c": crc32c(_canonical(body))}


def check_signed(document: Any, file: str) -> dict[str, Any]:
    """The fields of a signed JSON object. Raises CorruptError that names `file`."""
    if not isinstance(document, dict) or "crc32c" not in document:
        raise CorruptError(f"{file}: no crc32c field: the file is damaged; restore it from a copy")
    body = {name: value for name, value in document.items() if name != "crc32c"}
    found = crc32c(_canonical(body))
    if found != document["crc32c"]:
        raise CorruptError(
            f"{file}: its content has crc32c {found:#010x}, but {document['crc32c']} was recorded in it: "
            f"the file is damaged; restore it from a copy"
        )
    return body


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
