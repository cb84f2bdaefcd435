"""Registers bfloat16 with zarr-python when zarr is imported, and not before: importing zarr takes 0.45 s."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


def register_when_zarr_is_imported() -> None:
    """Register the Zarr data type `bfloat16`: at once if zarr is imported, else right after it is."""
    if "zarr" in sys.modules:
        _register()
    elif not any(isinstance(finder, _ZarrFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ZarrFinder())


def _register() -> None:
    from hiddenlake.cache.store import bfloat16

    bfloat16.register()


class _ZarrFinder(importlib.abc.MetaPathFinder):
    """Finds zarr as the other finders do, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "zarr":
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                spec.loader = _ZarrLoader(spec.loader)
                return spec
        return None


class _ZarrLoader(importlib.abc.Loader):
    """Runs zarr's own loader, puts it back in its place, and registers the data type."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _ZarrFinder)]
        _register()
