"""Remove bulk, say what each rule saved, and prove that nothing broke."""

from __future__ import annotations

from build.engine import script
from build.engine.plan import Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded

DESKTOP = (
    r"libx11-6|libxcb1|libxext6|libxtst6|x11-common|xserver-.*|libgtk-?[234].*|libqt[456].*|libwayland-.*"
    r"|libgl1.*|libegl1.*|libpulse0|.*-desktop"
)
"""Packages by which one knows that a Java runtime brought a desktop along."""


def step(loaded: Loaded, resolution: Resolution) -> Step:
    """Plan the minimize layer; an empty one when MINIMIZE is off."""
    settings = loaded.settings
    text = script.of(__file__, minimize=settings.minimize, jre=settings.jre, desktop=DESKTOP)
    return Step("minimize", text, script.programs(__file__) if settings.minimize else {})
