"""What is done as soon as another package is imported, without importing it here."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(module: str, then: str) -> None:
    """Import the module `then` when `module` has been imported: at once, or whenever somebody does."""
    if module in sys.modules:
        import_module(then)
    else:
        sys.meta_path.insert(0, _Waiting(module, then))


class _Waiting:
    """A finder that finds nothing by itself, and sees one module come."""

    def __init__(self, module: str, then: str) -> None:
        self._module, self._then, self._asking = module, then, False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._module or self._asking:
            return None
        self._asking = True
        try:
            found = (finder.find_spec(name, path, target) for finder in list(sys.meta_path))
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_go_on(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(self._then)

        spec.loader.exec_module = run_and_go_on  # type: ignore[method-assign]
        return spec
