"""Doing something once another package has imported a module, without importing it for that."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # `typing` takes longer to import than everything here
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


def after_import(module: str, do: Callable[[], object]) -> None:
    """Call `do()` whenever `module` has been imported: at once if it is there, and after its import or a reload."""
    sys.meta_path.insert(0, _Finder(module, do))
    if module in sys.modules:
        do()


class _Finder:
    """Finds one module as the finders after it do, with a loader that calls `do` at its end."""

    def __init__(self, module: str, do: Callable[[], object]):
        self.module, self.do = module, do

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self.do)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Another loader, which the module keeps as its own; `do` follows its work."""

    def __init__(self, inner: Loader, do: Callable[[], object]):
        self.inner, self.do = inner, do

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        self.do()
