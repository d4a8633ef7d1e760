"""Where results come from."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest

from gpmetric import provenance
from gpmetric.provenance import gpmetric_version, versions


def test_versions_are_those_installed() -> None:
    found = versions()
    assert found["python"] == sys.version.split()[0]
    for name in ("gpmetric", "torch", "transformers", "tokenizers", "numpy", "deap"):
        assert found[name] == version(name)


def test_a_copy_that_was_never_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise provenance.PackageNotFoundError(name)

    monkeypatch.setattr(provenance, "version", missing)
    assert gpmetric_version() == "unknown"
