"""Modules of files that are named, from their text as it is now; text is never executed as text."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType

__all__ = ["load_module"]


def load_module(path: Path, text: bytes | None = None, name: str | None = None) -> ModuleType:
    """The module of a file; bytecode beside it is neither read nor written.

    Args:
        path: of the file.
        text: what the file held when it was read; it need not be there any more.
        name: that others find the module by, as dataclasses and pickles do, in `sys.modules`; by default nobody does.
    """
    loader = _FreshLoader(name or path.stem, str(path), text)
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    if name is None:
        loader.exec_module(module)
        return module
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _FreshLoader(SourceFileLoader):
    def __init__(self, name: str, path: str, text: bytes | None) -> None:
        super().__init__(name, path)
        self._text = text

    def get_data(self, path: str) -> bytes:
        return super().get_data(path) if self._text is None else self._text

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code
