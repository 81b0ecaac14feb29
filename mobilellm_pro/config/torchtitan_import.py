"""Imports torchtitan's configuration classes without its models.

`import torchtitan` runs the package's `__init__`, which imports every quantization converter and with them its models,
FlexAttention and torch's compiler: eight seconds on two cores, for a user who only mistyped a key. The classes of the
configuration need none of it. So the package is entered in `sys.modules` with its `__init__` not yet run; that happens
with the first import of anything in torchtitan beside `config` and `tools`. Nothing is skipped, only put off.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "torchtitan"
_LIGHT = ("torchtitan.config", "torchtitan.tools")


class _InitOnFirstHeavyImport:
    """A finder that finds nothing: it stands before the others to run the package's `__init__` when it is due."""

    def __init__(self, package: ModuleType, spec: ModuleSpec) -> None:
        self.package = package
        self.spec = spec

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Never answers; the finders behind it do."""
        if name.startswith(f"{_PACKAGE}.") and not name.startswith(_LIGHT):
            self.run_init()

    def run_init(self) -> None:
        """Run torchtitan's `__init__`, once."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)  # first, because what follows imports more of torchtitan
            assert self.spec.loader is not None
            self.spec.loader.exec_module(self.package)


class _DeferredPackage(ModuleType):
    """torchtitan before its `__init__` ran. An attribute that is not there yet (`__version__`) brings it about."""

    def __getattr__(self, name: str) -> object:
        finder = next((finder for finder in sys.meta_path if isinstance(finder, _InitOnFirstHeavyImport)), None)
        if finder is None or name.startswith("_") and name != "__version__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        finder.run_init()
        return getattr(self, name)


def defer_torchtitan_init() -> None:
    """Enter torchtitan in `sys.modules` with its `__init__` put off. Does nothing if it has been imported already.

    Raises:
        ModuleNotFoundError: torchtitan is not installed.
    """
    if _PACKAGE in sys.modules:
        return
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise ModuleNotFoundError("torchtitan is not installed; `bash launch/test.sh` installs what is needed")
    package = importlib.util.module_from_spec(spec)
    package.__class__ = _DeferredPackage
    sys.modules[_PACKAGE] = package
    sys.meta_path.insert(0, _InitOnFirstHeavyImport(package, spec))
