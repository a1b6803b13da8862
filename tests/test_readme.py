"""The README says nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"@@|TODO|XXX|TBD", TEXT)


def test_the_files_it_links_to_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT)
    local = [target for target in targets if "://" not in target]
    assert len(local) > 3
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_every_claim_of_the_table_names_a_test() -> None:
    claims = re.findall(r"\]\((tests/[^)#]+)#([^)]+)\)", TEXT)
    assert len(claims) > 20
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path, _ in claims}
    assert [(path, name) for path, name in claims if f"def {name}(" not in sources[path]] == []
