"""The laboratory of libvirt's hosts: what it must bear."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from integration.lab import wait_until
from integration.virtlab import VirtLab

MIB = 1 << 20


@pytest.mark.thorough
def test_a_libvirtd_that_crashes_takes_no_other_test_with_it(virtlab: VirtLab) -> None:
    disk = virtlab.disk("first.qcow2", 64 * MIB)
    first = virtlab.boot(disk)
    (daemon,) = virtlab.hosts.libvirtd(far=False)
    os.kill(daemon, signal.SIGSEGV)
    wait_until(lambda: not Path(f"/proc/{daemon}/cmdline").read_bytes(), "libvirtd's end", 20)
    second = virtlab.boot(virtlab.disk("first.qcow2", 64 * MIB))
    assert first.runs() == []
    assert second.runs() == ["hosta"]
    second.destroy()
    virtlab.put_in_order()
