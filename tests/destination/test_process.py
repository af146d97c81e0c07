"""What counts as a process that is gone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_blkmig.destination.holders import _is_stopped
from qemu_blkmig.destination.process import ProcessId

WITHOUT_ITS_FIRST_THREAD = """
import ctypes, sys, threading, time
def last():
    while open("/proc/self/stat").read().rsplit(")", 1)[1].split()[0] != "Z":
        time.sleep(0.01)
    print("alone", flush=True)
    sys.stdin.read()
threading.Thread(target=last).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.fixture
def threads() -> Iterator[subprocess.Popen[str]]:
    """A process whose first thread has ended, while another lives until its stdin is closed."""
    command = [sys.executable, "-c", WITHOUT_ITS_FIRST_THREAD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "alone\n"
        yield process
        process.kill()


def test_a_process_is_not_gone_before_its_last_thread(threads: subprocess.Popen[str]) -> None:
    process = ProcessId.of(threads.pid)
    assert process is not None and process.alive
    assert process.kill(timeout=10)
    assert not process.alive


def test_a_zombie_is_gone() -> None:
    with subprocess.Popen(["/bin/true"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        started = ProcessId(process.pid, 0)
        process.stdout.read()
        while ProcessId.of(process.pid) is not None:
            time.sleep(0.01)
        assert not started.alive


def test_a_pid_given_anew_is_another_process() -> None:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        now = ProcessId.of(process.pid)
        assert now is not None
        assert not ProcessId(now.pid, now.start - 1).alive
        process.kill()


def test_a_process_may_have_a_name_that_is_not_utf_8() -> None:
    """The kernel cuts it after 15 bytes, in the midst of a letter, too (QEMU's -name process=...)."""
    script = "import sys; open('/proc/self/comm', 'wb').write(b'vm) \\xc3'); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = ProcessId.of(process.pid)
        assert found is not None and found.alive
        assert _is_stopped(Path(f"/proc/{process.pid}")) is False
        process.kill()
