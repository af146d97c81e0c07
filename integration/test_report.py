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


def shown(url: str, *options: str) -> str:
    """A page as a browser has it once its script has run; asserts that it complains of nothing."""
    command = (BROWSER, "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=1000")
    done = subprocess.run(
        [*command, *options, "--dump-dom", url], capture_output=True, text=True, timeout=LIMIT, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def test_the_report_of_a_calm_guest_in_a_browser_while_it_moves_and_after(lab: Lab, tmp_path: Path) -> None:
    disks = [lab.disk("disk", 32 * MIB, data=[(0, 8 * MIB)]), lab.disk("other", 8 * MIB, "qcow2", data=[(0, MIB)])]
    guest = lab.boot(disks, Orders(rate=50))
    guest.wait_for_writing(more=20)
    launched = lab.destination(guest)
    options = ("--launch", guest.launch_command(lab.target), "--switchover", "manual", "--downtime", 5000)
    moving = start(arguments("migrate", guest, lab.target, "--output", "json", "--progress", "json", *options))
    assert moving.stderr is not None
    wait_until(lambda: '"stage":"standby"' in moving.stderr.readline(), "the standby")  # type: ignore[union-attr]
    (job,) = (path.parent.name for path in lab.state.glob("*/record.json"))

    page = tmp_path / "report.html"
    live = start([*COMMAND, "report", job, "--live", "--html", str(page)])
    assert live.stdout is not None
    url = live.stdout.readline().strip()
    # Two seconds of the browser's own time: the page has asked for itself anew.
    seen = shown(url, "--virtual-time-budget=2000")
    assert "running: standby" in seen and "data-live" in seen.split("<head>")[0]

    finish(start([*COMMAND, "switchover", job])).succeeded()
    assert finish(moving).succeeded().result["outcome"] == "migrated"
    finish(live).succeeded()
    seen = shown(page.as_uri())
    assert ">migrated</p>" in seen and '<html lang="en">' in seen, "no live one any more"
    assert seen.count('id="cells-') == 4 and seen.count('id="times-') == 4, "two disks, each figure with its words"
    assert 'class="cursor-bar"' in seen and 'aria-valuetext="time: ' not in seen, "the script ran, and waits"
    assert "read back and compared" in seen and "last round" in seen
    assert_writes_soundly(launched)
