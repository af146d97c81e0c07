"""What wakes a copy: nudges are forgotten, a cancel never is."""

from __future__ import annotations

import select

import pytest

from qemu_blkmig.nbd.control import Control


@pytest.mark.parametrize("cancelled", [False, True])
def test_all_who_wait_hear_of_a_cancel_though_one_forgets_his_nudges(cancelled: bool) -> None:
    control = Control()
    control.nudge()
    if cancelled:
        control.cancel()
    control.nudged()
    poller = select.poll()
    poller.register(control.wake, select.POLLIN)
    assert bool(poller.poll(0)) is cancelled
    control.close()
