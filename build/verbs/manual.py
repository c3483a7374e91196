"""The manual page of `inv`, made from the verbs, the flags and the settings themselves (man(7) macros)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from build.engine import command_line
from build.engine.settings import Settings

FACTS = (
    ("0", "It is done."),
    ("1", "It failed: one line says what, one what to do about it."),
    (str(command_line.USAGE), "The command line makes no sense: one line says what is near."),
    ("130", "It was interrupted; finished layers are kept."),
)


def page(namespace: Any) -> str:
    """Return the page; `namespace` is the collection of all verbs."""
    contexts = namespace.to_contexts()
    parts = [
        f'.TH INV 1 "" "systemvm-builder {command_line.version()}" "User Commands"',
        ".SH NAME",
        f"{command_line.NAME} \\- build Debian system VM images and convert them for every hypervisor",
        ".SH SYNOPSIS",
        ".B inv\n[\\fIFLAG\\fR ...] [\\fIVERB\\fR [\\fIFLAG\\fR ...]] ...",
        ".SH DESCRIPTION",
        "Builds the disk image of a Debian system VM, layer by layer, and turns it into what each hypervisor",
        "imports. Without a verb it builds. Several verbs of one line run one after another.",
        ".SH VERBS",
        *(line for context in contexts for line in _verb(namespace, context)),
        ".SH FLAGS OF EVERY VERB",
        *_terms(command_line.SHOWN),
        ".SH SETTINGS",
        "\\fB\\-\\-set\\fR beats the environment (prefix SYSTEMVM_), which beats .env, which beats the image",
        "definition, which beats the default.",
        *_terms((name, field.description or "") for name, field in Settings.model_fields.items()),
        ".SH EXIT STATUS",
        *_terms(FACTS),
        ".SH SEE ALSO",
        "The folder docs of the checkout; \\fBssh_config\\fR(5).",
    ]
    return "\n".join(parts) + "\n"


def _verb(namespace: Any, context: Any) -> Iterable[str]:
    """A verb with its arguments, what it does, and its own flags."""
    arguments = "".join(f" \\fI{argument.name.upper()}\\fR" for argument in context.positional_args)
    yield f".TP\n\\fB{_plain(context.name)}\\fR{arguments}"
    yield _plain(" ".join((inspect.getdoc(namespace[context.name]) or "").split()))
    if rows := context.help_tuples():
        yield ".RS"
        yield from _terms(rows)
        yield ".RE"


def _terms(rows: Iterable[tuple[str, str | None]]) -> Iterable[str]:
    return (f".TP\n\\fB{_plain(term)}\\fR\n{_plain(text or '')}" for term, text in rows)


def _plain(text: str) -> str:
    """Text that no character of is a request or an escape."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text[:1] in (".", "'") else text
