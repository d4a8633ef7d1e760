"""What a release says of itself: one version, bounds that were tried, a CI that does what `make` does, a citation."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BOUNDS = {one.name: one for one in map(Requirement, PROJECT["dependencies"])}


def read_pins(name: str) -> dict[str, Requirement]:
    """The lines of a file of constraints, by the name of the package as pip compares it."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return {re.sub(r"[-_.]+", "-", one.name).lower(): one for one in map(Requirement, filter(None, lines))}


def version_of(pin: Requirement) -> Version:
    [exact] = pin.specifier
    assert exact.operator == "=="
    return Version(exact.version)


def test_the_version_stands_in_one_place_and_the_others_agree() -> None:
    """pyproject.toml has it; the program reads it from the installation, and files that cannot read agree."""
    [topmost] = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[:1]
    assert topmost == PROJECT["version"]
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]) == PROJECT["version"]
    assert not [
        path for path in ROOT.glob("gpmetric/**/*.py") if f'"{PROJECT["version"]}"' in path.read_text(encoding="utf-8")
    ]


def test_a_release_begins_with_what_a_user_must_change() -> None:
    """It names the bounds as they are."""
    release = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## [")[1]
    first = release.split("\n### ")[1]
    assert first.startswith("What you must change\n")
    for name, bound in re.findall(r"`([a-z-]+)>=([0-9.]+)`", first):
        assert str(BOUNDS[name].specifier) == f">={bound}"


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    oldest = read_pins("constraints-oldest.txt")
    assert list(oldest) == list(BOUNDS)
    for name, requirement in BOUNDS.items():
        [bound] = [one for one in requirement.specifier if one.operator == ">="]
        assert version_of(oldest[name]) == Version(bound.version), name
        assert str(oldest[name].marker) == str(requirement.marker)


def test_the_newest_versions_are_within_the_bounds() -> None:
    newest = read_pins("constraints.txt")
    assert newest.keys() >= BOUNDS.keys()
    for name, requirement in BOUNDS.items():
        assert requirement.specifier.contains(version_of(newest[name])), name


def test_the_citation_has_what_the_format_asks_for() -> None:
    """Citation File Format 1.2.0: required keys, and of what they are; cffconvert --validate says the same."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert found["cff-version"] == "1.2.0"
    assert found["type"] == "software"
    assert found["license"] == PROJECT["license"]
    for work in (found, *found["references"]):
        assert work["authors"]
        assert all(set(author) <= {"name", "family-names", "given-names"} for author in work["authors"])
    for work in found["references"]:
        assert {"authors", "title", "type"} <= work.keys()
        assert isinstance(work["year"], int)


def test_ci_runs_what_make_has() -> None:
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    jobs = ci["jobs"]
    assert jobs.keys() == {"test", "nightly", "oldest", "lint", "docs", "build"}
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = {target for command in commands for target in re.findall(r"\bmake (\w+)", command)}
    assert targets == {"test", "nightly", "oldest", "lint"}
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == ">=3.11"
    assert "secrets." not in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert ci["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= (90 if name == "nightly" else 60) for name, job in jobs.items())


def test_what_is_run_on_the_oldest_versions_is_there() -> None:
    [names] = re.findall(r"^OLDEST := (.+)$", MAKEFILE, re.MULTILINE)
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in names.split())


@pytest.mark.parametrize("tool", ["ruff check", "ruff format --check", "mypy"])
def test_hooks_run_what_lint_does(tool: str) -> None:
    """The tools of the environment: a version that the hooks pin would be a second place for it."""
    [local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert local["repo"] == "local"
    assert all(hook["language"] == "system" for hook in local["hooks"])
    assert any(f"-m {tool}" in hook["entry"] for hook in local["hooks"])
    assert f"-m {tool}" in MAKEFILE
