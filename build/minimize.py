"""Minimize: take bulk out of the image, say what each rule saved, and prove that nothing broke."""

from __future__ import annotations

from pathlib import Path

from build.engine.plan import File, Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded
from build.engine.shell import quote

TOOLS = ("closure.py", "elf.py", "minimize.py")

DESKTOP = (
    r"libx11-6|libxcb1|libxext6|libxtst6|x11-common|xserver-.*|libgtk-?[234].*|libqt[456].*|libwayland-.*"
    r"|libgl1.*|libegl1.*|libpulse0|.*-desktop"
)
"""Packages by which one knows that a Java runtime brought a desktop along."""


def step(loaded: Loaded, resolution: Resolution) -> Step:
    """Plan the minimize layer; an empty one when MINIMIZE is off."""
    settings = loaded.settings
    if not settings.minimize:
        return Step("minimize", 'note "MINIMIZE is off: nothing is taken out"\n')
    folder = Path(__file__).parent / "tools"
    files = {name: File((folder / name).read_bytes()) for name in TOOLS}
    return Step("minimize", _headless(settings.jre) + SCRIPT, files)


def _headless(jre: str) -> str:
    if not jre:
        return ""
    return f"""\
desktop="$("$PYTHON" -I "$FILES/closure.py" "$ROOT" {quote(jre)} {quote(DESKTOP)})"
[ -z "$desktop" ] ||
    fail "the Java runtime brought a desktop library: ${{desktop%%$'\\n'*}}" "set jre to a headless package"

"""


SCRIPT = r"""# Some packages only recommend what a plug-in of theirs needs: a gap here is for the log.
"$PYTHON" -I "$FILES/elf.py" check "$ROOT" "$WORK/needed" || true

"$PYTHON" -I "$FILES/minimize.py" "$ROOT" >"$WORK/saved"
while IFS=$'\t' read -r rule count bytes; do
    if [ "$count" -eq 0 ]; then continue; fi
    note "$(printf '%-16s %8s in %6d files' "$rule" "$(numfmt --to=iec "$bytes")" "$count")"
done <"$WORK/saved"

# What still runs is tried while what still links is looked at.
runs() {
    if [ -e "$ROOT/usr/bin/python3" ]; then
        in_tree python3 -c 'import ctypes, hashlib, json, ssl, subprocess'
    fi
    if [ -e "$ROOT/usr/bin/java" ] || [ -L "$ROOT/usr/bin/java" ]; then in_tree java -version; fi
}
runs &
trying=$!
gone="$("$PYTHON" -I "$FILES/elf.py" recheck "$ROOT" "$WORK/needed")" ||
    fail "minimize took what programs need: ${gone%%$'\n'*}" "correct build/tools/minimize.py"
audit="$(in_tree dpkg --audit)"
[ -z "$audit" ] ||
    fail "dpkg finds packages half installed: ${audit%%$'\n'*}" "read the log of this step"
wait "$trying"
"""
