"""Stands for torchvision: these libraries import much of it, and nothing here uses it.

The real one needs a build that fits torch's, which package registries have only with
CUDA.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class Anything(type):
    """A class that has every attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Part(types.ModuleType):
    """A module in which every name is a class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Parts(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every submodule."""

    def find_spec(self, name, path, target=None):
        if not name.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Part(spec.name)

    def exec_module(self, module):
        pass


__path__ = []
__version__ = "0.0.0"
sys.meta_path.append(Parts())


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")
