"""Values as JSON has them. Everything the package writes as JSON goes through here, so that every JSON reader reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """The same of dictionaries, lists, texts and numbers alone; None for a number that is not finite: JSON has none.

    Raises:
      TypeError: something else is in it.
    """
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "__array__"):  # of numpy or JAX
        return plain(np.asarray(value).tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def dumps(value: Any, **how: Any) -> str:
    """json.dumps of `plain(value)`; how: its other arguments."""
    return json.dumps(plain(value), allow_nan=False, **how)
