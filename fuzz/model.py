#!/usr/bin/env python3
"""The engine's model test from as many seeds as there is time for; the quick tests run few, and always the same.

    fuzz/model.py FIRST COUNT

A seed is ten examples, and takes a tenth of a second. The violation that is found, if any, is raised as the test does.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.engine.machine import explore


def main() -> None:
    """Explore from so many seeds."""
    first, count = map(int, sys.argv[1:])
    explore(range(first, first + count))


if __name__ == "__main__":
    main()
