"""Writes JSON schemas of the files that users write to docs/schemas, from which editors complete and check them.

python -m tools.schemas            # after a change of a configuration
python -m tools.schemas --check    # exits with 1 where a file is not current
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, create_model

from keye.config import GenerationConfig, ProcessorConfig
from keye.config.model import GENERATION_FIELDS
from keye.planning.fleet_file import FleetFile
from keye.train.recipes.family.config import FamilyConfig
from keye.train.recipes.nano.config import NanoConfig

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"
#: Official fields of preprocessor_config.json.
PROCESSOR_FIELDS = ("patch_size", "merge_size", "image_mean", "image_std")


def describe_fields(config: type, names: list[str], **more: Any) -> dict[str, Any]:
    """The schema of an object with these fields of a dataclass, and `more` as (type, default)."""
    hints, fields = get_type_hints(config), {field.name: field for field in dataclasses.fields(config)}
    chosen: dict[str, Any] = {name: (hints[name], fields[name].default) for name in names}
    schema = create_model("Fields", **chosen, **more).model_json_schema()
    del schema["title"]
    return schema


def checkpoint_schema(title: str, official: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The schema of a checkpoint's file: official fields, among which unknown ones are left alone, and keye's own."""
    own = {**own, "description": "keye's own fields.", "additionalProperties": False}
    definitions = {"$defs": own.pop("$defs")} if "$defs" in own else {}
    return {"title": title, **official, "properties": {**official["properties"], "keye": own}, **definitions}


def make_schemas() -> dict[str, dict[str, Any]]:
    """The schemas by the name of their file."""
    sampling = [field.name for field in dataclasses.fields(GenerationConfig)]
    official = [name for name in sampling if name not in (*GENERATION_FIELDS, "eos_token_ids")]
    processor = [field.name for field in dataclasses.fields(ProcessorConfig) if field.name != "release"]
    pixels = {"min_pixels": (int | None, None), "max_pixels": (int | None, None)}
    return {
        "train.json": TypeAdapter(FamilyConfig | NanoConfig).json_schema(),
        "fleet.json": FleetFile.model_json_schema(),
        "generation_config.json": checkpoint_schema(
            "generation_config.json",
            describe_fields(GenerationConfig, official, eos_token_id=(int | list[int] | None, None)),
            describe_fields(GenerationConfig, list(GENERATION_FIELDS)),
        ),
        "preprocessor_config.json": checkpoint_schema(
            "preprocessor_config.json",
            describe_fields(ProcessorConfig, list(PROCESSOR_FIELDS), **pixels),
            describe_fields(ProcessorConfig, processor, release=(str, "2.0")),
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file is not current")
    check = parser.parse_args().check
    stale = []
    for name, schema in make_schemas().items():
        text = json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if stale and check:
        print(f"docs/schemas: {', '.join(stale)} not current; run python -m tools.schemas")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
