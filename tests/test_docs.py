"""What the documents say is what the code does."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

import servebench
from servebench.constraint import parse_constraint

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_profile_reference_is_the_schemas() -> None:
    rewrite = runpy.run_path(str(ROOT / "docs" / "profile_table.py"))["rewrite"]
    assert rewrite(README) == README, "run `make docs`"


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert servebench.__version__ == project["version"]
    assert re.search(
        rf"^## {re.escape(project['version'])}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )


def test_every_constraint_in_the_readme_is_one() -> None:
    section = README.partition("### Constraints")[2].partition("### Verdicts")[0]
    examples = [
        text for row in section.splitlines() if row.startswith("| `") for text in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert len(examples) >= 9
    for text in examples:
        assert parse_constraint(text).text == text


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z]+)\b(?=[`\s]+#|`)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("document", ["README.md", "docs/trust.md", "docs/architecture.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("document", ["docs/trust.md", "docs/architecture.md", "README.md"])
def test_files_named_in_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:servebench|servers|tests|docs|benchmarks)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
