"""The property-based, stateful test of the engine: DESIGN.md's invariants 1 to 4 and 6."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.engine.machine import Machine

TestEngineLosesNoWrite = Machine.TestCase
TestEngineLosesNoWrite.settings = settings(
    max_examples=150,
    stateful_step_count=14,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
