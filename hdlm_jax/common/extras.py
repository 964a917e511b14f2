"""Packages that are not always there."""

from __future__ import annotations

import importlib
from types import ModuleType


def package(module: str, extra: str, where: str) -> ModuleType:
    """The module of an optional package; ValueError that says what to install for `where`."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{where}: needs the {module.partition('.')[0]} package: "
                         f"pip install 'hdlm_jax[{extra}]'") from None
