"""A calm guest's report in a real browser: while it moves, and after."""

from __future__ import annotations

import subprocess
from pathlib import Path

from integration.lab import Lab, wait_until
from integration.tool import COMMAND, arguments, assert_writes_soundly, finish, start
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20
BROWSER = "chromium-headless-shell"
LIMIT = 120


def shown(url: str, wanted: str, seconds: float = 1) -> str:
    """A page that holds `wanted`, as a browser has it after so many seconds of its own time.

    On a busy machine that time may be over before the page is there. Asserts that the browser complains of nothing.
    """
    seen: list[str] = []

    def holds() -> bool:
        seen.append(_dumped(url, seconds))
        return wanted in seen[-1]

    wait_until(holds, f"{wanted!r} on the page", LIMIT, lambda: seen[-1][:4000])
    return seen[-1]


def _dumped(url: str, seconds: float) -> str:
    command = (BROWSER, "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr")
    done = subprocess.run(
        [*command, f"--virtual-time-budget={seconds * 1000:.0f}", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def test_the_report_of_a_calm_guest_in_a_browser_while_it_moves_and_after(lab: Lab, tmp_path: Path) -> None:
    disks = [lab.disk("disk", 32 * MIB, data=[(0, 8 * MIB)]), lab.disk("other", 8 * MIB, "qcow2", data=[(0, MIB)])]
    guest = lab.boot(disks, Orders(rate=50))
    guest.wait_for_writing(more=20)
    launched = lab.destination(guest)
    # On a busy machine the last round may never fit: the guest moves all the same.
    options = ("--switchover", "manual", "--downtime", 5000, "--on-stall", "pause", "--output", "json")
    moving = start(arguments("migrate", guest, lab.target, "--launch", guest.launch_command(lab.target), *options))
    assert moving.stderr is not None
    told = moving.stderr
    wait_until(lambda: told.readline().startswith("standby"), "the standby")
    (job,) = (path.parent.name for path in lab.state.glob("*/record.json"))

    page = tmp_path / "report.html"
    live = start([*COMMAND, "report", job, "--live", "--html", str(page)])
    assert live.stdout is not None
    url = live.stdout.readline().strip()
    # Long enough for the page to have asked for itself anew.
    seen = shown(url, "running: standby", 2)
    assert "data-live" in seen.split("<head>")[0]

    finish(start([*COMMAND, "switchover", job])).succeeded()
    assert finish(moving).succeeded().result["outcome"] == "migrated"
    finish(live).succeeded()
    seen = shown(page.as_uri(), ">migrated</p>")
    assert '<html lang="en">' in seen, "no live one any more"
    assert all(f'id="{name}"' in seen for name in ("cells-0", "times-0", "cells-1", "times-1")), "two disks"
    assert 'class="cursor-bar"' in seen and 'aria-valuetext="time: ' not in seen, "the script ran, and waits"
    assert "read back and compared" in seen and "last round" in seen
    assert_writes_soundly(launched)
