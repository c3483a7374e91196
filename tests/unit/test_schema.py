"""config/schema.json, by which editors complete and check an image definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from build.engine import schema
from build.engine.settings import Settings

CONFIG = Path(__file__).resolve().parents[2] / "config"
DEFINITIONS = sorted(CONFIG.glob("*.yaml"))


def faults(definition: dict[str, Any]) -> list[str]:
    """What an independent reader of the schema finds wrong."""
    checker = jsonschema.Draft202012Validator(schema.schema())
    return [error.message for error in checker.iter_errors(definition)]


def test_the_file_is_what_the_settings_say() -> None:
    again = "run: .venv/bin/python -m build.engine.schema"
    assert schema.FILE.read_text(encoding="utf-8") == schema.text(), again
    jsonschema.Draft202012Validator.check_schema(schema.schema())


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda path: path.name)
def test_shipped_definitions_fit_and_name_it_for_editors(definition: Path) -> None:
    text = definition.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert faults(yaml.safe_load(text)) == []


def test_every_key_tells_what_it_is() -> None:
    properties = schema.schema()["properties"]
    assert set(properties) == {*Settings.model_fields, "schema"} - {"password", "password_hash"}
    tables = [f"#/$defs/{name}" for name in schema.schema()["$defs"]]
    silent = [
        name
        for name, told in properties.items()
        if not told.get("description") and told.get("$ref") not in tables
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("definition", "fault"),
    [
        ({"sizze": 300}, "'sizze' was unexpected"),
        ({"size": "big"}, "is not of type 'integer'"),
        ({"size": 3}, "is less than the minimum"),
        ({"suite": "sid"}, "is not one of"),
        ({"formats": "vhd"}, "is not of type 'array'"),
        ({"vrrp": {"priority": 300}}, "is greater than the maximum"),
        ({"password": "x"}, "'password' was unexpected"),
        ({"password_hash": "x"}, "'password_hash' was unexpected"),
        ({"schema": 9}, "was expected"),
    ],
    ids=str,
)
def test_what_the_builder_refuses_it_refuses(definition: dict[str, Any], fault: str) -> None:
    assert any(fault in told for told in faults(definition)), faults(definition)
