"""Makes the first use of pydantic cheaper in processes of our own. Imported before pydantic, for its effect alone.

To look for plugins, pydantic names ``importlib.metadata.entry_points`` when it builds its first model, and that module
brings in readers of e-mail, zip and csv: 2.3 MB that stay, and 20 ms on a fast machine. So the module is loaded when
something of it is used, not when it is named; and plugins are switched off by pydantic's own switch: code of whatever
else is installed has no business in a process that holds keys.

Only for our own command lines and children. The client for apps must not import this: an app may want its plugins.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

_NAME = "importlib.metadata"


class _Late(ModuleType):
    """Stands for ``importlib.metadata`` until something of it is used."""

    @staticmethod
    def entry_points(**selection: Any) -> Any:
        """The real function's answer."""
        return _real().entry_points(**selection)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # asked by the import machinery, which must not load it
        return getattr(_real(), name)


def _real() -> ModuleType:
    if isinstance(sys.modules.get(_NAME), _Late):
        del sys.modules[_NAME]
    return importlib.import_module(_NAME)


def _install() -> None:
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if _NAME not in sys.modules:
        late = _Late(_NAME)
        sys.modules[_NAME] = late
        setattr(importlib, "metadata", late)  # noqa: B010 - what importing the real one would set; mypy knows that one


_install()
