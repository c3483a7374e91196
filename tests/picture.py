"""The picture of a build for README: a real run on a real terminal, drawn as SVG."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

CHECKOUT = Path(__file__).resolve().parents[1]
FILE = CHECKOUT / "docs" / "build.svg"
WIDTH, HEIGHT = 80, 24
LIMIT = 1800.0
"""Seconds for the build."""
SHOWN = "./inv build --image config/tiny.yaml"


def main() -> None:
    """Build the tiny image anew on a terminal and draw what is seen on the way and at the end."""
    with tempfile.TemporaryDirectory(prefix="systemvm-picture-") as folder:
        on_the_way, end = _watch(Path(folder))
    *before, bar = on_the_way.splitlines()
    rest = [line for line in end.splitlines() if line not in before]
    FILE.write_text(draw("\n".join([f"$ {SHOWN}", *before, bar, *rest])), encoding="utf-8")
    print(f"{FILE.relative_to(CHECKOUT)}: {FILE.stat().st_size} bytes")


def _watch(folder: Path) -> tuple[str, str]:
    """Run the build in tmux; return its screen while a line shows how far it is, and the last one."""
    location = folder / "location"
    line = [sys.executable, "-m", "invoke", *shlex.split(SHOWN)[1:], "--set", f"location={location}"]

    def tmux(*words: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null", *words],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.rstrip()

    size = ("-x", str(WIDTH), "-y", str(HEIGHT), "-c", str(CHECKOUT))
    tmux("new-session", "-d", *size, f"{shlex.join(line)}; echo over $?; exec sleep 60")
    try:
        limit, on_the_way = time.monotonic() + LIMIT, ""
        while "over " not in (screen := tmux("capture-pane", "-p", "-e", "-J")):
            if "last time)" in screen or "% |" in screen:
                on_the_way = screen
            if time.monotonic() > limit:
                sys.exit("the build does not end")
            time.sleep(0.3)
    finally:
        tmux("kill-server")
    screen, _, status = screen.rpartition("over ")
    if status != "0":
        sys.exit(f"the build failed:\n{screen}")
    shown = str(location)
    return on_the_way, screen.rstrip().replace(shown, "LOCATION")


def draw(screen: str) -> str:
    """Return text with a terminal's escapes as SVG that loads nothing from elsewhere."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.from_ansi(screen))
    return str(console.export_svg(title="inv build", code_format=LAYOUT))


LAYOUT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""What rich fills in; its own one fetches fonts from a server."""


if __name__ == "__main__":
    main()
