"""The wheel holds what a checkout holds, with the kernels under gpmetric.kernels and never on the top level."""

from __future__ import annotations

import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads: setuptools leaves build/ and *.egg-info beside the sources."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, copy)
    for folder in ["gpmetric", "kernels"]:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module", params=["from the tree", "through an sdist"])
def wheel(request: pytest.FixtureRequest, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built offline; through an sdist is the way of `python -m build`, where a missing file goes unnoticed."""
    out = tmp_path_factory.mktemp("wheel")
    source = tree
    if request.param == "through an sdist":
        build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
        run([sys.executable, "-c", build, str(out)], cwd=tree)
        [source] = out.glob("*.tar.gz")
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    run([*PIP, "wheel", *offline, "--wheel-dir", str(out), str(source)], cwd=out)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_wheel_holds_every_module(contents: dict[str, bytes]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("gpmetric/**/*.py")}
    assert modules - {"gpmetric/kernels/__init__.py"} <= contents.keys()
    templates = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("gpmetric/*/templates/*")}
    assert len(templates) > 4
    assert templates | {"gpmetric/py.typed"} <= contents.keys()


@pytest.mark.slow
def test_wheel_holds_the_kernels_as_a_subpackage(contents: dict[str, bytes]) -> None:
    """A top-level `kernels` would overwrite Hugging Face's package of that name; the shim is for checkouts only."""
    assert {name.partition("/")[0].partition("-")[0] for name in contents} == {"gpmetric"}
    shipped = {name for name in contents if name.startswith("gpmetric/kernels/")}
    assert shipped == {"gpmetric/kernels/README.md", *(f"gpmetric/kernels/{name}.py" for name in KERNELS)}


@pytest.mark.slow
def test_wheel_holds_the_demo_model(contents: dict[str, bytes]) -> None:
    demo = ROOT / "gpmetric" / "demo"
    files = [path for path in [demo / "README.md", *demo.glob("model/*")] if path.is_file()]
    for path in files:
        assert contents[path.relative_to(ROOT).as_posix()] == path.read_bytes()


@pytest.mark.slow
def test_wheel_metadata(contents: dict[str, bytes]) -> None:
    [info] = {name.partition("/")[0] for name in contents if ".dist-info/" in name}
    metadata = contents[f"{info}/METADATA"].decode()
    assert "gpmetric = gpmetric.__main__:main" in contents[f"{info}/entry_points.txt"].decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert f"{info}/licenses/LICENSE" in contents


@pytest.mark.slow
def test_installed_wheel_imports_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run([*PIP, "install", "--no-index", "--no-deps", "--target", str(target), str(wheel)], cwd=elsewhere)
    code = """
import importlib.metadata, pkgutil
import gpmetric, gpmetric.kernels
print(gpmetric.__file__)
print(*gpmetric.kernels.__path__)
print(*sorted(module.name for module in pkgutil.iter_modules(gpmetric.kernels.__path__)))
print(importlib.metadata.version("gpmetric"))
"""
    lines = run([sys.executable, "-c", code], cwd=elsewhere, PYTHONPATH=str(target)).splitlines()
    assert lines[0] == str(target / "gpmetric" / "__init__.py")
    assert lines[1] == str(target / "gpmetric" / "kernels")
    assert lines[2].split() == KERNELS
    assert lines[3] == wheel.name.split("-")[1]


def test_checkout_finds_the_kernels() -> None:
    """The shim's part: no reinstallation for a new kernel file."""
    import gpmetric.kernels

    assert str(ROOT / "kernels") in gpmetric.kernels.__path__
    assert sorted(module.name for module in pkgutil.iter_modules(gpmetric.kernels.__path__)) == KERNELS


def test_kernels_folder_shadows_nothing() -> None:
    """As a regular package the folder breaks transformers; a file named after a library would hide that library."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not {"triton", "torch"} & set(KERNELS)
