"""What an adopter looks for: licence, pages whose links lead somewhere, workflows, the manual page."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import cli
from tests.golden.test_lint import clean, tracked

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


def missing_modules(text: str) -> set[str]:
    """Files of Python that a text names, by path or by name, and the checkout has not."""
    paths = {str(path.relative_to(CHECKOUT)) for path in tracked()}
    names = {path.rpartition("/")[2] for path in paths}
    named = set(re.findall(r"(?<![\w./])[a-z_0-9][a-z_0-9/]*\.py\b", text))
    return {name for name in named if name not in (paths if "/" in name else names)}


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("as ext4.py writes it, or build/disk/ext4.py, in .../x.py and NAME.py", set()),
        ("SET is JSON as debootstrap.py writes it", {"debootstrap.py"}),
        ("see build/engine/ext4.py", {"build/engine/ext4.py"}),
    ],
)
def test_the_rule_of_names_sees_what_it_must(text: str, missing: set[str]) -> None:
    assert missing_modules(text) == missing


def test_modules_that_docstrings_name_are_there() -> None:
    texts = (
        node.value.value
        for path in (*CHECKOUT.glob("build/**/*.py"), CHECKOUT / "tasks.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    assert missing_modules("\n".join(text for text in texts if isinstance(text, str))) == set()


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
