"""How the lab starts its own Python processes, so that they run this very copy of miniproxy."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this interpreter; `environment` goes with it."""
    return [sys.executable, "-m", module, *arguments]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with the folder of this package first on the module path."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{_ROOT}{os.pathsep}{path}" if path else str(_ROOT), **more}
