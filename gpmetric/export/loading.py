"""Importing a module file that gpmetric has written."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType

__all__ = ["load_module"]


def load_module(path: Path) -> ModuleType:
    """The module of a file, from its text as it is now: bytecode beside it is neither read nor written."""
    loader = _FreshLoader(path.stem, str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


class _FreshLoader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code
