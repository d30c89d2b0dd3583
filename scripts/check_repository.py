"""Repository checks that no linter does: the published schema is current, links lead somewhere, doors exist."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from edgeattn.quant.recipe import json_schema

_ROOT = Path(__file__).resolve().parent.parent
_SCHEMA = _ROOT / "docs" / "recipe.schema.json"
_DOORS = ("quant", "export", "runtime_plugins", "devices", "cli.py")


def schema_problems() -> list[str]:
    if not _SCHEMA.is_file() or json.loads(_SCHEMA.read_text()) != json_schema():
        return [f"{_SCHEMA.relative_to(_ROOT)} is out of date; run: python scripts/check_repository.py --write-schema"]
    return []


def link_problems() -> list[str]:
    problems = []
    for page in [*_ROOT.glob("*.md"), *(_ROOT / "docs").rglob("*.md"), *(_ROOT / "samples").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith(("http:", "https:")) and not (page.parent / target).exists():
                problems.append(f"{page.relative_to(_ROOT)} links to {target}, which does not exist")
    return problems


def door_problems() -> list[str]:
    return [
        f"door {name} should be a symbolic link to edgeattn/{name}"
        for name in _DOORS
        if not (_ROOT / name).is_symlink() or (_ROOT / name).resolve() != _ROOT / "edgeattn" / name
    ]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write-schema"]:
        _SCHEMA.write_text(json.dumps(json_schema(), indent=2) + "\n")
    found = schema_problems() + link_problems() + door_problems()
    sys.exit("\n".join(found) or 0)
