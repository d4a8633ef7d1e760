"""The wheel holds what a checkout holds, with the kernels under gpmetric.kernels and never on the top level.

It is built from the tree and through an sdist, and installed in an environment of its own, on the dependencies that the
tests run with: the newest. `make oldest` has those of constraints-oldest.txt, which are gigabytes.
"""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
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
    assert templates | {"gpmetric/py.typed", "gpmetric/__init__.pyi"} <= contents.keys()


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
@pytest.mark.parametrize("wheel", ["through an sdist"], indirect=True)  # it holds what the other does, and takes longer
def test_installed_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Nothing of the checkout is in reach: the command measures the demo model and writes an export from the wheel."""
    run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run([*PIP, "--python", str(python), "install", "--no-index", "--no-deps", "--no-compile", str(wheel)], cwd=tmp_path)
    [own] = (tmp_path / "env").glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # behind its own, no .pth of theirs
    clean = {"PYTHONPATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code = """
import importlib.metadata, pkgutil
import gpmetric, gpmetric.kernels
print(gpmetric.__file__)
print(*gpmetric.kernels.__path__)
print(*sorted(module.name for module in pkgutil.iter_modules(gpmetric.kernels.__path__)))
print(importlib.metadata.version("gpmetric"))
"""
    lines = run([str(python), "-c", code], cwd=tmp_path, **clean).splitlines()
    version = wheel.name.split("-")[1]
    assert lines == [
        str(own / "gpmetric" / "__init__.py"),
        str(own / "gpmetric" / "kernels"),
        " ".join(KERNELS),
        version,
    ]
    command = str(python.with_name("gpmetric"))
    assert run([command, "--version"], cwd=tmp_path, **clean).split()[-1] == version
    run([command, "export", "abs(W)*sqrt(X)", "--format", "triton", "-o", "kernel.py"], cwd=tmp_path, **clean)
    assert "def prune(" in (tmp_path / "kernel.py").read_text()
    evaluated = run([command, "evaluate", "--windows", "1", "--json", "-"], cwd=tmp_path, **clean)
    assert json.loads(evaluated)["model"] == "demo"


def test_checkout_finds_the_kernels() -> None:
    """The shim's part: no reinstallation for a new kernel file."""
    import gpmetric.kernels

    assert str(ROOT / "kernels") in gpmetric.kernels.__path__
    assert sorted(module.name for module in pkgutil.iter_modules(gpmetric.kernels.__path__)) == KERNELS


def test_kernels_folder_shadows_nothing() -> None:
    """As a regular package the folder breaks transformers; a file named after a library would hide that library."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not {"triton", "torch"} & set(KERNELS)
