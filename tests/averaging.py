"""Lightning's callbacks that average weights, where it has them."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback, callbacks


def averaging(name: str = "EMAWeightAveraging", **options: Any) -> Callback:
    """A callback of this name; a test that asks for one that Lightning does not have is skipped."""
    if not hasattr(callbacks, name):
        pytest.skip(f"this version of Lightning has no {name}")
    return getattr(callbacks, name)(**options)
