"""What only a thorough run tests (`pytest integration --thorough`): more of the same, for which CI has no time.

The moments of an attempt are many and much alike: CI has one of each kind, and each of them where it matters.
"""

from __future__ import annotations

from typing import Any

import pytest


def also(*values: Any) -> list[Any]:
    """Parameters that only a thorough run has; several arguments of a test as a tuple."""
    marks = pytest.mark.thorough
    return [pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks) for value in values]
