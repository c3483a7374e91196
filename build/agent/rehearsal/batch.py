"""Documents as they reach a router: singly, or as the batch of a router's start; and the scripts' checksum.

Facts from CloudStack 4.22's AbstractConfigItemFacade, FileConfigItem, ScriptConfigItem and
VirtualRoutingResource: a document gets a UUID behind its name, and is merged by `update_config.py`.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from build.wire import Document

CACHE = "/var/cache/cloud/"
BIN = "/opt/cloud/bin/"
VERSION = "1.0"
"""Of the batch's form."""

Names = Callable[[], str]


def _uuid() -> str:
    return str(uuid.uuid4())


def file_name(document: Document, names: Names = _uuid) -> str:
    """Return the name under which a document is sent."""
    return f"{document.name}.{names()}"


def update(name: str) -> str:
    """Return the command that merges a document."""
    return f"{BIN}update_config.py {name}"


def compose(documents: Sequence[Document], names: Names = _uuid) -> str:
    """Return the text that `vr_cfg.sh -c` reads: each document's file, and the command that merges it."""
    parts = ["#Apache CloudStack Virtual Router Config File\n", f"<version>\n{VERSION}\n</version>\n"]
    for document in documents:
        name = file_name(document, names)
        parts.append(f"<file>\n{CACHE}{name}\n{document.text}\n</file>\n")
        parts.append(f"<script>\n{update(name)}\n</script>\n")
    return "".join(parts)


SIGNATURES = {32: "md5", 128: "sha512"}
"""Checksum of the scripts by its length: md5 up to 4.21, SHA-512 from 4.22."""


def signature_fault(signature: str, scripts: Path) -> str:
    """Say what is wrong with the signature that a guest tells of an archive, or nothing."""
    kind = SIGNATURES.get(len(signature))
    if kind is None:
        return f"the signature is neither md5 nor SHA-512: {signature or 'nothing'}"
    with scripts.open("rb") as stream:
        digest = hashlib.file_digest(stream, kind).hexdigest()
    return "" if digest == signature else f"{kind} {signature} is not that of the archive, {digest}"
