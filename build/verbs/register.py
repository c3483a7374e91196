"""`inv register`: the calls that make converted files known to a CloudStack management server.

They are printed; with an endpoint they are made, by the `cs` client. Keys come from the environment only, and
nothing that is shown holds them.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from build import wire
from build.engine import cloudstack, urls
from build.engine.errors import BuildError
from build.engine.pipeline import Build
from build.printable import printable
from build.verbs import convert

ALL_ZONES = "-1"
TIMEOUT = 60
"""Seconds that the server has for an answer."""
HINTS: Mapping[int, str] = {
    401: "check CLOUDSTACK_KEY and CLOUDSTACK_SECRET, and the clock of this machine",
    431: "correct what it names; system templates are registered by a root administrator",
    432: "the keys must be a root administrator's",
    531: "the keys must be a root administrator's",
}
"""By the server's error code (ApiErrorCode.java)."""

Artifact = Mapping[str, Any]
"""What the manifest of a converted file tells."""


@dataclass(frozen=True)
class Template:
    """A file to register: what registerTemplate takes, but for the id of the guest system."""

    params: Mapping[str, str]
    guest_os: str
    """Display name of the guest system."""


def templates(artifacts: Iterable[Artifact], base: str, zone: str, upgrade: bool) -> list[Template]:
    """What is registered of each file, served from the folder `base`.

    For an upgrade they are user templates: the upgrade finds them by name and makes them system templates
    (SystemVmTemplateRegistration.updateRegisteredTemplateDetails); the old release starts nothing from them.
    """
    kind = {} if upgrade else {"templatetype": "SYSTEM"}
    found = []
    for artifact in artifacts:
        told = dict(artifact["register"])
        guest_os = told.pop("ostype")
        url = f"{base}/{quote(artifact['file'])}"
        params = {**told, **kind, "url": url, "zoneid": zone}
        found.append(Template({key: _text(value) for key, value in params.items()}, guest_os))
    return found


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def lines(found: Sequence[Template]) -> list[str]:
    """The calls as people read them, and as the `cs` command takes them."""
    shown = []
    for guest_os in dict.fromkeys(template.guest_os for template in found):
        shown.append(_line("listOsTypes", {"description": guest_os}))
        for template in found:
            if template.guest_os == guest_os:
                shown.append(_line("registerTemplate", {**template.params, "ostypeid": "ID"}))
    return shown


def _line(command: str, params: Mapping[str, str]) -> str:
    return shlex.join([command, *(f"{key}={value}" for key, value in params.items())])


def register(build: Build, url: str, zone: str, endpoint: str, upgrade: bool) -> None:
    """Print the calls for every file that is there, or make them; raises BuildError before the first one."""
    base = check_url("--url", url or _served_from(build.settings.download_url))
    if not re.fullmatch(r"-1|[0-9A-Za-z-]{1,64}", zone):
        raise BuildError(
            f"--zone {zone!r} is no zone's id", "copy it from the zone's page, or leave it out for all"
        )
    if zone != ALL_ZONES and not upgrade:
        raise BuildError(
            "a system template is for all zones", "leave --zone out, or register for an upgrade: --upgrade"
        )
    client = Client(check_url("--endpoint", endpoint), os.environ) if endpoint else None
    found = templates(_artifacts(build), base, zone, upgrade)
    if client is None:
        for line in lines(found):
            print(line)
        build.console.line(
            "nothing was called; ID is the id that listOsTypes answers. To make the calls: --endpoint URL"
        )
        return
    for template in found:
        made = client.register(template)
        build.console.line(f"registered {template.params['name']}  {made}")


def _served_from(url: str) -> str:
    if url.startswith("file:"):
        raise BuildError(
            "no URL tells where the files are served from",
            "copy them to a web server that CloudStack reaches: --url https://HOST/FOLDER",
        )
    return url


def _artifacts(build: Build) -> list[Artifact]:
    """What the manifests tell of the files that are there, or of those that --formats names."""
    settings, known = build.settings, tuple(cloudstack.FORMATS)
    if not convert.for_cloudstack(settings):
        raise BuildError(
            "this image is for no release of CloudStack",
            "set cloudstack_release and arch amd64, then convert",
        )
    asked = convert.chosen(build.flags.formats, settings) if build.flags.formats else known
    if other := [name for name in asked if name not in known]:
        raise BuildError(f"CloudStack has no system template in {other[0]}", f"use {', '.join(known)}")
    files = {convert.file_name(name, settings): name for name in asked}
    rows = build.host.ask(wire.Made(build.prospect.place.location, tuple(files)))
    for row in rows:
        file, hint = row.file, f"run: inv convert.{files[row.file]}"
        if row.state == "changed":
            raise BuildError(f"{file} was changed after it was made", hint)
        if row.state == "missing" and build.flags.formats:
            raise BuildError(f"{file} is not converted yet", hint)
        if row.state == "made" and "register" not in row.artifact:
            raise BuildError(f"{file} was made for no release of CloudStack", hint)
    artifacts: list[Mapping[str, Any]] = [row.artifact for row in rows if row.state == "made"]
    if not artifacts:
        raise BuildError("nothing is converted for CloudStack yet", "run: inv convert")
    return artifacts


def check_url(flag: str, url: str) -> str:
    """A URL of HTTP without what belongs into no command line; raises BuildError."""
    if set("@?#") & set(url):
        raise BuildError(
            f"{flag}: a user, a query or a fragment is not allowed there", "put keys into the environment"
        )
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or not re.fullmatch(r"[!-~]+", url):
        right = urls.in_full(url, ("https", "http"))
        hint = f"write {flag} {right if right and right != url else 'https://HOST/...'}"
        raise BuildError(f"{flag} {url!r} is no URL of HTTP", hint)
    return url.rstrip("/")


class Client:
    """A management server's API, with keys from the environment."""

    def __init__(self, endpoint: str, environ: Mapping[str, str]) -> None:
        missing = [name for name in ("CLOUDSTACK_KEY", "CLOUDSTACK_SECRET") if not environ.get(name)]
        if missing:
            raise BuildError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set",
                "export the keys of a root administrator, or leave --endpoint out to see the calls",
            )
        self.endpoint = endpoint
        self._secrets = (environ["CLOUDSTACK_KEY"], environ["CLOUDSTACK_SECRET"])
        self._ca = environ.get("CLOUDSTACK_VERIFY")
        self._os_types: dict[str, str] = {}

    def register(self, template: Template) -> str:
        """Register one; answers its id. Raises BuildError."""
        answer = self._call(
            "registerTemplate", {**template.params, "ostypeid": self._os_type(template.guest_os)}
        )
        rows = _rows(answer, "template")
        return printable(rows[0].get("id", "")) if rows else ""

    def _os_type(self, name: str) -> str:
        if name not in self._os_types:
            rows = _rows(self._call("listOsTypes", {"description": name}), "ostype")
            ids = [str(row["id"]) for row in rows if row.get("description") == name and "id" in row]
            if not ids:
                raise BuildError(
                    f"{self.endpoint} knows no guest system {name!r}",
                    "is it of the release that the image is for? see docs/cloudstack.md",
                )
            self._os_types[name] = ids[0]
        return self._os_types[name]

    def _call(self, command: str, params: Mapping[str, str]) -> Any:
        """Make one call; POST, so that no key gets into a server's log of addresses. Raises BuildError."""
        from cs import CloudStack, CloudStackApiException, CloudStackException

        key, secret = self._secrets
        client = CloudStack(
            self.endpoint, key=key, secret=secret, method="post", timeout=TIMEOUT, verify=self._ca or None
        )
        try:
            return getattr(client, command)(**params)
        except CloudStackApiException as error:
            told = error.error if isinstance(error.error, Mapping) else {}
            code = told.get("errorcode", error.response.status_code)
            text = told.get("errortext", error.error)
            raise BuildError(
                f"{command}: {self.endpoint} answers {self._hide(code)}: {self._hide(text)}",
                HINTS.get(code, "the server's log tells more") if isinstance(code, int) else "",
            ) from None
        except CloudStackException:
            raise BuildError(
                f"{self.endpoint} does not answer as CloudStack's API does",
                "name the API itself: --endpoint https://HOST/client/api",
            ) from None
        except OSError as error:  # all that the HTTP library raises is one
            reason = re.sub(r"['\")>]+$", "", str(error)).rpartition(": ")[2]
            raise BuildError(
                f"{self.endpoint} cannot be reached: {self._hide(reason)}",
                "check --endpoint; CLOUDSTACK_VERIFY names a file of certificates to trust",
            ) from None

    def _hide(self, text: object) -> str:
        shown = printable(text)
        for secret in self._secrets:
            shown = shown.replace(secret, "***")
        return shown


def _rows(answer: object, key: str) -> list[Mapping[str, Any]]:
    """Rows of an answer; none of one that has none, or is not what it should be."""
    rows = answer.get(key, []) if isinstance(answer, Mapping) else []
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
