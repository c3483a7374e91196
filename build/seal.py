"""Seal: take out what must never ship, set root's password, and prove that the image is clean."""

from __future__ import annotations

import json
from pathlib import Path

from build.engine import overlay
from build.engine.plan import File, Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded

PASSWORD = "password-hash"
"""Secret with root's crypt(3) hash; empty or absent locks the password."""


def step(loaded: Loaded, resolution: Resolution) -> Step:
    """Plan the last layer; it is the same whatever MINIMIZE says."""
    kept = sorted(path for folder in loaded.overlays for path in overlay.read(folder))
    tool = Path(__file__).parent / "tools" / "seal.py"
    files = {"seal.py": File(tool.read_bytes()), "kept.json": File(json.dumps(kept, indent=1).encode())}
    return Step("seal", SCRIPT, files, secrets=(PASSWORD,))


SCRIPT = f"""\
"$PYTHON" -I "$FILES/seal.py" "$ROOT" "$FILES/kept.json" "$SECRETS/{PASSWORD}" 2>"$WORK/left" || {{
    cat "$WORK/left" >&2
    fail "seal: $(head -n 1 "$WORK/left")" "take it out of the overlay, or correct the step that leaves it"
}}
"""
