"""Remove what must never ship, set root's password, and prove that the image is clean."""

from __future__ import annotations

import json

from build.engine import overlay, script
from build.engine.plan import File, Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded

PASSWORD = "password-hash"
"""Secret with root's crypt(3) hash; empty or absent locks the password."""


def step(loaded: Loaded, resolution: Resolution) -> Step:
    """Plan the last layer; it is the same whatever MINIMIZE says."""
    kept = sorted(path for folder in loaded.overlays for path in overlay.read(folder))
    files = {**script.programs(__file__), "kept.json": File(json.dumps(kept, indent=1).encode())}
    return Step("seal", script.of(__file__, password=PASSWORD), files, secrets=(PASSWORD,))
