"""The JSON Schema of image definitions, made from the settings: editors complete and check by it.

`python -m build.engine.schema` writes config/schema.json anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from build.engine.settings import SECRETS, Settings
from build.engine.sources import SCHEMA

FILE = Path(__file__).resolve().parents[2] / "config" / "schema.json"


def schema() -> dict[str, Any]:
    """Return the schema (JSON Schema 2020-12)."""
    made = Settings.model_json_schema()
    properties = {name: value for name, value in made["properties"].items() if name not in SECRETS}
    version = {"const": SCHEMA, "description": "Version of the keys of this file."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **made,
        "title": "Image definition",
        "properties": {"schema": version, **properties},
    }


def text() -> str:
    """Return it as the file has it."""
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
