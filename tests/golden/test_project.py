"""What an adopter looks for: licence, pages whose links lead somewhere, workflows, the manual page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import cli
from tests.golden.test_lint import clean

CHECKOUT = cli.CHECKOUT
PAGES = [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md")]
CHECK = Path(sys.executable).with_name("check-jsonschema")
WORKFLOWS = {
    "vendor.github-workflows": sorted((CHECKOUT / ".github/workflows").glob("*.yml")),
    "vendor.gitlab-ci": [CHECKOUT / ".gitlab-ci.yml"],
}


def test_the_licence_is_apaches_as_debian_has_it() -> None:
    assert (CHECKOUT / "LICENSE").read_bytes() == Path("/usr/share/common-licenses/Apache-2.0").read_bytes()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_and_names_of_files_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    named = re.findall(r"`((?:docs|config|tests|build|bench|templates)/[\w./-]+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in named if not (CHECKOUT / name).exists() and "NAME" not in name]
    assert missing == []


def test_every_page_is_in_the_index() -> None:
    index = (CHECKOUT / "docs/README.md").read_text(encoding="utf-8")
    assert [page.name for page in CHECKOUT.glob("docs/*.md") if f"({page.name})" not in index] == [
        "README.md"
    ]


@pytest.mark.parametrize("schema", WORKFLOWS)
def test_workflows_fit_their_schema_and_call_what_we_call(schema: str) -> None:
    files = WORKFLOWS[schema]
    more = ("--data-transform", "gitlab-ci") if "gitlab" in schema else ()
    clean(CHECK, "--builtin-schema", schema, *more, *files)
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert ".ci/run" in text
    assert "./inv test --ring soak" in text


def test_a_workflow_that_is_none_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "bad.yml").write_text("on: push\njobs: {test: {steps: 3}}\n")
    line = [str(CHECK), "--builtin-schema", "vendor.github-workflows", str(tmp_path / "bad.yml")]
    assert subprocess.run(line, capture_output=True, check=False).returncode == 1


def test_hooks_before_a_commit_run_what_is_there() -> None:
    told = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"].split()[0] for repo in told["repos"] for hook in repo["hooks"]]
    own = [Path(sys.executable).with_name(Path(entry).name) for entry in entries if "/" in entry]
    assert len(entries) > 3
    assert all(tool.exists() for tool in own)


def test_the_manual_page_has_every_verb_and_no_fault() -> None:
    from tasks import namespace

    page = cli.succeed("manual")
    done = subprocess.run(
        ["man", "--warnings", "--encoding=utf8", "-l", "-"],
        input=page,
        env={**cli.environment(), "MANWIDTH": "100", "LC_ALL": "C.UTF-8", "MAN_KEEP_FORMATTING": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    shown = re.sub(r".\x08", "", done.stdout)
    lines = [line.split() for line in shown.splitlines()]
    first = {words[0] for words in lines if words}
    assert {context.name for context in namespace.to_contexts()} <= first
    assert {"debian_mirror", "imagename", "vrrp"} <= first
    assert "--ask-password" in first
