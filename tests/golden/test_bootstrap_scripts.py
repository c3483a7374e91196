"""The scripts of the bootstrap and of the initramfs are clean by shellcheck, for every tool and arch."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from build import debootstrap, initramfs
from build.engine import script
from build.engine.plan import Step
from build.engine.resolution import Package, Resolution
from build.engine.settings import Loaded, Settings

pytestmark = pytest.mark.golden
RESOLUTION = Resolution(
    (
        Package("apt", "2.6~1", "amd64", "a" * 64, 1, "http://x.example/a.deb", True),
        Package("tool", "1:1+b2", "all", "b" * 64, 1, "http://x.example/b.deb"),
    ),
    1,
    2,
    "http://x.example/debian",
)


def steps() -> dict[str, Step]:
    found = {}
    for tool, arch in (("mmdebstrap", "amd64"), ("debootstrap", "i386")):
        settings = Settings.model_validate({"bootstrap": tool, "arch": arch})
        loaded = Loaded(settings, {}, Path("x.yaml"))
        found[tool] = debootstrap.step(loaded, RESOLUTION)
        found[f"initramfs-{arch}"] = initramfs.step(loaded, RESOLUTION)
    return found


@pytest.mark.parametrize("name", steps())
def test_shellcheck_has_nothing_to_say(name: str, tmp_path: Path) -> None:
    file = tmp_path / "step.sh"
    file.write_text(script.render(steps()[name].script))
    done = subprocess.run(
        ["shellcheck", "-s", "bash", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_hook_is_clean(tmp_path: Path) -> None:
    file = tmp_path / "hook"
    file.write_bytes(steps()["initramfs-amd64"].files["hook"].content)
    # SC1091: what it includes lies in the image.
    argv = ["shellcheck", "-e", "SC1091", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
