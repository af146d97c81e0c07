"""Jobs seen and steered from another terminal: real copies, real sockets, the command line's own words."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from integration.lab import Lab, wait_until
from integration.luck import Attempt
from integration.tool import (
    COMMAND,
    Outcome,
    arguments,
    assert_nothing_left,
    assert_writes_soundly,
    finish,
    start,
)
from qemu_blkmig.demo.guest import Orders
from qemu_blkmig.destination.basecache import SETTLED

MIB = 1 << 20


def tool(*words: object) -> Outcome:
    """Run one of the commands about jobs."""
    return finish(start([*COMMAND, *map(str, words)]))


def listed(*options: str) -> list[dict[str, Any]]:
    """What `jobs` lists."""
    found: list[dict[str, Any]] = tool("jobs", "--output", "json", *options).succeeded().result["jobs"]
    return found


def status(job: str) -> dict[str, Any]:
    """What `status` tells."""
    return tool("status", job, "--output", "json").succeeded().result


def look(job: str) -> dict[str, Any] | None:
    """What the job says of itself on its control socket, if it answers."""
    try:
        record = json.loads((Path(os.environ["QEMU_BLKMIG_STATE_DIR"]) / job / "record.json").read_text())
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(f"{record['runtime']}/control")
            client.sendall(b'{"type": "status"}\n')
            with client.makefile("rb") as answers:
                told: dict[str, Any] = json.loads(answers.readline())
                return told
    except (OSError, ValueError):
        return None


def carried(job: str) -> float:
    """Bytes that have come across, what is under way included."""
    told = look(job)
    assert told is not None
    return float(sum(disk["percent"] * disk["size"] / 100 for disk in told["disks"]))


def copying(lab: Lab, name: str, size: int, *options: object) -> tuple[subprocess.Popen[str], str]:
    """Start to copy an image full of data; its process and, once it copies, its job."""
    known = {path.parent.name for path in lab.state.glob("*/record.json")}
    disk = lab.disk(name, size, data=[(0, size)])
    wait_until(lambda: time.time() > disk.path.stat().st_ctime + SETTLED, "an image that is at rest")
    process = start(arguments("copy", disk.path, lab.target, "--output", "json", *options))
    new: list[str] = []

    def copies() -> bool:
        assert process.poll() is None, process.communicate()
        new[:] = {path.parent.name for path in lab.state.glob("*/record.json")} - known
        told = look(new[0]) if new else None
        return told is not None and told["phase"] == "bulk" and bool(told["disks"])

    wait_until(copies, "the job that copies")
    return process, new[0]


def test_limits_that_are_set_from_another_terminal_hold_at_once_and_history_tells_of_it(lab: Lab) -> None:
    process, job = copying(lab, "disk", 64 * MIB, "--bandwidth", "3")
    told = tool("set", job, "--bandwidth", "64k", "--downtime", 77).succeeded().stdout
    assert "bandwidth: 0.1 MiB/s, downtime: 77 ms" in told
    before = carried(job)
    seen = status(job)
    assert (seen["state"], seen["phase"], seen["bandwidth"], seen["downtime"]) == ("running", "bulk", 65536, 0.077)
    assert seen["guest"] == "no guest is concerned"
    wait_until(lambda: carried(job) > before, "a low limit lets something through")
    assert carried(job) - before < MIB, "at 3 MiB/s it would be much more by now"
    assert "bandwidth limit 0.1 MiB/s" in tool("status", job).succeeded().stdout
    tool("set", job, "--bandwidth", "1k").failed(3, "--bandwidth must be at least 64k")
    tool("switchover", job).failed(3, "does not wait")

    following = start([*COMMAND, "status", job, "--follow", "--output", "json"])
    tool("set", job, "--bandwidth", "none").succeeded()
    finish(process).succeeded()
    lines = [json.loads(line) for line in finish(following).succeeded().stdout.splitlines()]
    assert lines[-1]["state"] == "finished" and lines[-1]["outcome"]["exit_code"] == 0
    assert listed() == []
    over = next(each for each in listed("--all") if each["job"] == job)
    assert over["outcome"]["text"] == "copied" and over["disks"][0]["copied"] == 64 * MIB
    assert "finished" in tool("status", job).succeeded().stdout
    tool("cancel", job).failed(3, f"job {job} is over")
    lab.assert_no_leftovers(directories=[lab.target])


def test_a_cancelled_job_ends_clean_and_a_killed_one_is_told_of_and_cleaned_up(lab: Lab) -> None:
    process, job = copying(lab, "disk", 16 * MIB, "--bandwidth", "64k")
    assert "was cancelled" in tool("cancel", job).succeeded().stdout
    finish(process).failed(128 + signal.SIGINT, "cancelled from another terminal", now="no guest is concerned")
    assert not list(lab.target.iterdir()) and listed() == []
    assert status(job)["outcome"]["exit_code"] == 130

    process, job = copying(lab, "other", 16 * MIB, "--bandwidth", "1")
    wait_until(lambda: carried(job) > 0, "something to be kept")
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    wait_until(lambda: status(job)["state"] == "suspended", "the watchdog")
    tool("cleanup", job).succeeded()
    told = status(job)
    assert told["state"] == "finished" and told["disks"][0]["size"] == 16 * MIB
    assert listed() == [] and not list(lab.target.iterdir())


def killed_in_the_middle(lab: Lab, name: str) -> str:
    """A copy of an image that has come far when it is killed; its job, once that is at rest."""
    process, job = copying(lab, name, 16 * MIB, "--bandwidth", "8")
    wait_until(lambda: carried(job) > 8 * MIB, "half of it")
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    wait_until(lambda: status(job)["state"] == "suspended", "the watchdog")
    return job


def test_the_copy_of_an_image_goes_on_if_the_image_is_as_it_was(lab: Lab) -> None:
    job = killed_in_the_middle(lab, "disk")
    result = tool("resume", job, "--bandwidth", "1000", "--output", "json").succeeded().result
    assert result["disks"][0]["resumed"] >= 4 * MIB
    assert filecmp.cmp(lab.directory / "disk", lab.target / "disk", shallow=False)

    job = killed_in_the_middle(lab, "other")
    with (lab.directory / "other").open("r+b") as image:
        image.write(b"changed")
    changed = tool("resume", job).failed(3, "has changed since its copy began", f"qemu-blkmig resume {job} --compare")
    assert "is kept at the destination" in changed.stderr
    tool("resume", job, "--compare", "--bandwidth", "1000").succeeded()
    assert filecmp.cmp(lab.directory / "other", lab.target / "other", shallow=False)
    assert listed() == []


def test_a_job_whose_processes_are_all_dead_is_told_to_be_left_behind_and_cancel_removes_it(lab: Lab) -> None:
    process, job = copying(lab, "disk", 16 * MIB, "--bandwidth", "64k")
    # It is not to act upon the end of one before all are dead.
    os.kill(process.pid, signal.SIGSTOP)
    for pid in [*_children(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    finish(process)
    wait_until(lambda: status(job)["state"] == "left behind", "the last process of the job")
    left = status(job)
    assert left["phase"] == "bulk" and left["disks"][0]["size"] == 16 * MIB, "the journal tells"
    assert f"qemu-blkmig cleanup {job}" in left["next"]
    assert tool("switchover", job).code == 3
    tool("cancel", job).succeeded()
    assert listed() == [] and not list(lab.target.iterdir())


def _children(pid: int) -> list[int]:
    """Children of all threads of a process."""
    told = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for line in told for word in line.split()]


def test_a_guest_that_waits_for_the_word_is_kept_in_step_and_moves_when_it_is_given(lab: Lab) -> None:
    guest = lab.boot([lab.disk("disk", 32 * MIB, data=[(0, 8 * MIB)])], Orders(rate=200))
    guest.wait_for_writing(more=20)
    launched = lab.destination(guest)
    command = ("--launch", guest.launch_command(lab.target), "--switchover", "manual", "--downtime", 5000)
    process = start(arguments("migrate", guest, lab.target, "--output", "json", *command))

    def stands_by() -> bool:
        assert process.poll() is None, process.communicate()
        told = [look(path.parent.name) for path in lab.state.glob("*/record.json")]
        return any(
            each and each["phase"] == "standby" and each["predicted_downtime"] is not None and each["round"]
            for each in told
        )

    wait_until(stands_by, "the standby")
    (job,) = (path.parent.name for path in lab.state.glob("*/record.json"))
    told = tool("status", job).succeeded().stdout
    assert "predicted downtime" in told and f"qemu-blkmig switchover {job} moves the guest" in told
    assert "the guest is the source's, and runs there" in told
    guest.wait_for_writing(more=20)
    assert "moves" in tool("switchover", job).succeeded().stdout
    outcome = finish(process).succeeded()
    assert outcome.result["outcome"] == "migrated"
    assert f"qemu-blkmig switchover {job}" in outcome.stderr
    assert_writes_soundly(launched)
    assert [each["outcome"]["text"] for each in listed("--all")] == ["migrated"]
    assert_nothing_left(lab, launched)


def test_copies_share_a_budget_and_wait_for_a_slot_and_the_part_of_one_that_is_killed_is_given_back(lab: Lab) -> None:
    options = ("--bandwidth-group", "test=2M", "--slots", 2)
    first, one = copying(lab, "one", 64 * MIB, *options)
    second, two = copying(lab, "two", 64 * MIB, *options)
    wait_until(lambda: [bandwidth(one), bandwidth(two)] == [MIB, MIB], "each to have half of the budget")
    third = start(arguments("copy", lab.disk("three", MIB).path, lab.target, "--output", "json", *options))

    def waits() -> bool:
        told = [look(path.parent.name) for path in lab.state.glob("*/record.json")]
        return any(each and each["note"] == "waits for a slot, 2 of 2 taken" for each in told)

    wait_until(waits, "the third to wait")
    os.kill(second.pid, signal.SIGKILL)
    finish(second)
    outcome = finish(third).succeeded()
    assert "waits for a slot, 2 of 2 taken" in outcome.stderr
    wait_until(lambda: bandwidth(one) == 2 * MIB, "the budget to be one's alone")
    tool("set", one, "--bandwidth", "none").succeeded()
    assert bandwidth(one) == 2 * MIB, "the group's budget holds, whatever the job's own limit is"
    tool("cancel", one).succeeded()
    finish(first)


def test_what_jobs_of_a_group_leave_goes_to_the_others_and_comes_back_when_they_want_it(lab: Lab) -> None:
    group = ("--bandwidth-group", "test=4M")
    guest = lab.boot([lab.disk("idle", MIB)], Orders(rate=1, span=64 << 10))
    guest.wait_for_writing()
    waiting = Attempt(lab, guest, *group, "--switchover", "manual")
    waiting.wait_event(lambda event: "are kept in step" in event.get("text", ""), "the disks to be in step")
    idle = waiting.job()
    first, one = copying(lab, "one", 64 * MIB, *group)
    wait_until(lambda: (bandwidth(one) or 0) > 36 * MIB // 10, "nearly all of the budget to be the copy's")
    before = carried(one)
    wait_until(lambda: bandwidth(idle) == 2 * MIB, "the other to be left what it may carry at once")
    second, two = copying(lab, "two", 64 * MIB, *group, "--bandwidth", "1M")
    wait_until(lambda: 25 * MIB // 10 < (bandwidth(one) or 0) < 32 * MIB // 10, "what the second copy leaves")
    assert carried(one) > before
    tool("set", two, "--bandwidth", "none").succeeded()
    wait_until(lambda: abs((bandwidth(one) or 0) - (bandwidth(two) or 0)) < MIB // 4, "both to get the same")
    os.kill(second.pid, signal.SIGKILL)
    finish(second)
    wait_until(lambda: (bandwidth(one) or 0) > 36 * MIB // 10, "what the killed one had to be the first one's")
    waiting.signal(signal.SIGKILL)
    waiting.outcome()
    wait_until(lambda: bandwidth(one) == 4 * MIB, "the budget to be one's alone")
    tool("cancel", one).succeeded()
    finish(first)
    for job in (idle, two):
        tool("cleanup", job).succeeded()
    assert not listed()


def bandwidth(job: str) -> int | None:
    """The limit in force."""
    told = look(job)
    return told["bandwidth"] if told else None
