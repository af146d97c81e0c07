"""A migration that was interrupted goes on where it was: what is certain is not copied again, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from integration.judges import BLOCK, assert_rest_equal, record_blocks
from integration.lab import Format, Guest, Lab, assert_records_sound, wait_until
from integration.listened import Listened
from integration.luck import Attempt, Bench, command, kill
from integration.thorough import also
from integration.tool import COMMAND, assert_nothing_left
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20
NODE = "disk0"


@contextlib.contextmanager
def file_system(place: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `place`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def writing_guest(lab: Lab, size: int, format: Format = "raw") -> Guest:
    """A guest with a disk full of data, to a part of which it writes all the time."""
    disk = lab.disk("disk", size, format, data=[(0, size)])
    guest = lab.boot([disk], Orders(rate=100, span=2 * MIB))
    guest.wait_for_writing()
    return guest


def resumed(attempt: Attempt, *options: object) -> dict[str, Any]:
    """Resume the attempt's job, which comes to its end now; the result."""
    outcome = command("resume", attempt.job(), "--output", "json", *map(str, options))
    return outcome.succeeded().result


def wait_share(attempt: Attempt, percent: int) -> None:
    """Wait until so much of the bulk pass has arrived."""
    attempt._wait(
        lambda: any(e.get("percent", 0) >= percent for e in attempt._events()), f"{percent} % of the bulk pass"
    )


def assert_suspended(attempt: Attempt) -> None:
    """Assert that the guest runs on at the source, that the job is listed, and the images are still there."""
    wait_until(lambda: attempt.source.status() == "running", "the guest", 20)
    assert "suspended" in command("jobs").stdout
    assert list(attempt.lab.target.iterdir())


def test_a_coordinator_killed_late_in_the_bulk_pass_has_little_to_send_again(lab: Lab) -> None:
    guest = writing_guest(lab, 64 * MIB)
    before = bytes_read_by(guest.pid)
    attempt = Attempt(lab, guest, "--bandwidth", "16M", "--source-after", "keep")
    wait_share(attempt, 90)
    attempt.signal(signal.SIGKILL)
    assert f"qemu-blkmig resume {attempt.job()}" in attempt.outcome().stderr
    assert_suspended(attempt)
    assert_little_sent_again(attempt, before, percent=5)


def test_three_drops_in_one_job_have_little_to_send_again_together(lab: Lab) -> None:
    guest = writing_guest(lab, 64 * MIB)
    before = bytes_read_by(guest.pid)
    attempt = Attempt(lab, guest, "--bandwidth", "16M", "--source-after", "keep")
    wait_share(attempt, 30)
    attempt.signal(signal.SIGKILL)
    attempt.outcome()
    job = attempt.job()
    for percent, who in ((60, "agent"), (90, "coordinator")):
        again = Listened([*COMMAND, "resume", job, "--progress=json"], lab.directory / "go")
        again.wait_event(lambda event, least=percent: event.get("percent", 0) >= least, f"{percent} %")  # type: ignore[misc]
        kill(attempt.agent()) if who == "agent" else again.signal(signal.SIGKILL)
        again.outcome()
    assert_little_sent_again(attempt, before, percent=4)


def assert_little_sent_again(attempt: Attempt, before: int, *, percent: int) -> None:
    """Resume to the end; less than that of the disk was read again since `before`, beside what the guest wrote."""
    guest = attempt.source
    size = guest.disks[0].size
    (disk,) = resumed(attempt, "--bandwidth", "1000")["disks"]
    # Told by the kernel, of the QEMU that all is read from: nobody's own count.
    sent = bytes_read_by(guest.pid) - before
    assert sent >= size
    assert sent - size - disk["copied_dirty"] < size * percent // 100, (sent, disk)
    guest.kill()
    attempt.assert_destination_has_it()


def bytes_read_by(pid: int) -> int:
    """What a process has read from files and devices so far."""
    line = next(line for line in Path(f"/proc/{pid}/io").read_text().splitlines() if line.startswith("rchar:"))
    return int(line.split()[1])


def test_an_image_that_was_tampered_with_while_the_job_was_suspended_is_told_and_mended(lab: Lab) -> None:
    size = 16 * MIB
    guest = writing_guest(lab, size)
    attempt = Attempt(lab, guest, "--bandwidth", "4M")
    wait_share(attempt, 80)
    kill(attempt.agent())
    attempt.outcome().failed(1, now="the guest runs at the source")
    # Nobody writes there but we: the records lie elsewhere.
    written = record_blocks(guest.disks[0], 2 * MIB)
    block = next(number for number in range(size // 8 // BLOCK, size // BLOCK) if number not in written)
    image = attempt.destination.disks[0].path
    with image.open("r+b") as file:
        file.seek(block * BLOCK)
        file.write(b"tampered")
    outcome = command("resume", attempt.job(), "--bandwidth", "1000", "--output", "json").succeeded()
    (disk,) = outcome.result["disks"]
    assert disk["resumed"] >= size // 2
    told = [line for line in outcome.stderr.splitlines() if "what was read back from the destination" in line]
    offset = block * BLOCK // (64 << 10) * (64 << 10)
    assert told and f"disk {disk['name']}" in told[0] and f"from offset {offset}" in told[0], outcome.stderr
    attempt.destination.pause()
    assert_rest_equal(guest.disks[0], attempt.destination.disks[0], 2 * MIB)
    attempt.destination.resume()
    attempt.assert_destination_has_it()


@pytest.mark.parametrize("moment", ["moving RAM", "last round over", *also("converged", "paused")])
def test_a_coordinator_killed_later_has_only_what_is_dirty_to_send(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment)
    attempt.signal(signal.SIGKILL)
    attempt.outcome()
    assert_suspended(attempt)
    (disk,) = resumed(attempt)["disks"]
    assert disk["resumed"] == disk["virtual_size"]
    assert disk["copied"] == disk["copied_dirty"]
    attempt.assert_destination_has_it()


def test_when_all_our_processes_were_killed_resume_brings_the_guest_back_and_goes_on(bench: Bench) -> None:
    attempt = bench.attempt_at("paused")
    attempt.signal(signal.SIGSTOP)
    kill(attempt.watchdog())
    attempt.signal(signal.SIGKILL)
    attempt.outcome()
    assert resumed(attempt)["disks"][0]["resumed"]
    attempt.assert_destination_has_it()


@pytest.mark.parametrize(("moment", "kind"), [("bulk", "qcow2"), ("paused", "raw")])
def test_a_killed_agent_suspends_the_job_and_it_goes_on(bench: Bench, moment: str, kind: str) -> None:
    attempt = bench.attempt_at(moment, kind=kind)
    kill(attempt.agent())
    attempt.go_on()
    attempt.outcome().failed(1, "agent", f"qemu-blkmig resume {attempt.job()}", now="the guest runs at the source")
    assert_suspended(attempt)
    resumed(attempt, "--bandwidth", "1000")
    attempt.assert_destination_has_it()


def test_a_killed_nbd_server_leaves_an_image_that_can_be_gone_on_with(bench: Bench) -> None:
    attempt = bench.attempt_at("bulk", kind="qcow2")
    kill(attempt.child("qemu-nbd"))
    attempt.outcome().failed(1, "the destination cannot be", now="the guest runs at the source")
    assert_suspended(attempt)
    resumed(attempt, "--bandwidth", "1000")
    attempt.assert_destination_has_it()


def test_a_destination_that_was_full_and_is_made_larger_goes_on(lab: Lab) -> None:
    guest = writing_guest(lab, 16 * MIB)
    with file_system(lab.target, 10 * MIB):
        attempt = Attempt(lab, guest)
        room = "make room at the destination: qemu-blkmig resume"
        attempt.outcome().failed(1, "No space left on device", room, now="the guest runs at the source")
        subprocess.run(["mount", "-o", f"remount,size={40 * MIB}", lab.target], check=True)
        (disk,) = resumed(attempt)["disks"]
        assert disk["resumed"] >= 4 * MIB
        attempt.assert_destination_has_it()


def test_a_hangup_suspends_and_an_interrupt_gives_up(bench: Bench) -> None:
    attempt = bench.attempt_at("bulk")
    attempt.signal(signal.SIGHUP)
    attempt.outcome().failed(129, "SIGHUP", f"qemu-blkmig resume {attempt.job()}", now="the guest runs at the source")
    assert_suspended(attempt)
    job = attempt.job()
    command("cleanup", job).succeeded()
    attempt.assert_source_has_it()


def test_two_coordinators_for_one_job_are_one_too_many(bench: Bench) -> None:
    attempt = bench.attempt_at("bulk")
    command("resume", attempt.job()).failed(3, "still being worked on")
    attempt.signal(signal.SIGINT)
    attempt.outcome().failed(130)
    attempt.assert_source_has_it()


def test_an_image_that_was_replaced_meanwhile_is_refused(bench: Bench) -> None:
    attempt = bench.attempt_at("bulk")
    attempt.signal(signal.SIGHUP)
    attempt.outcome()
    image = attempt.destination.disks[0].path
    aside = image.with_name("aside")
    image.rename(aside)
    image.write_bytes(bytes(attempt.source.disks[0].size))
    command("resume", attempt.job()).failed(3, "is not the file that was being filled")
    aside.replace(image)
    resumed(attempt, "--bandwidth", "1000")
    attempt.assert_destination_has_it()


@pytest.mark.parametrize("kind", ["qcow2", *also("raw")])
def test_an_agent_of_an_earlier_attempt_that_hangs_is_named_with_what_to_do(bench: Bench, kind: str) -> None:
    attempt = bench.attempt_at("bulk", kind=kind)
    agent = attempt.agent()
    os.kill(agent, signal.SIGSTOP)
    attempt.signal(signal.SIGKILL)
    attempt.outcome()
    try:
        outcome = command("resume", attempt.job())
        outcome.failed(3, f"was lost and hangs, process {agent} (stopped by a signal) on ", f"kill -KILL {agent}")
        assert "open for writing in a QEMU" not in outcome.stderr
    finally:
        kill(agent)
    resumed(attempt, "--bandwidth", "1000")
    attempt.assert_destination_has_it()


def test_a_source_that_was_restarted_is_told_and_compared(lab: Lab) -> None:
    guest = writing_guest(lab, 16 * MIB)
    attempt = Attempt(lab, guest, "--bandwidth", "2M")
    wait_share(attempt, 50)
    attempt.signal(signal.SIGHUP)
    attempt.outcome().failed(129)
    guest.kill()
    again = lab.restart(guest)
    again.wait_for_writing()
    told = command("resume", attempt.job()).failed(3, "was restarted", f"qemu-blkmig resume {attempt.job()} --compare")
    assert "the guest is at the source" in told.stderr
    resumed(attempt, "--compare", "--bandwidth", "1000", "--on-stall", "pause", "--max-rounds", "2")
    attempt.assert_destination_has_it()


def test_retry_goes_on_by_itself(bench: Bench) -> None:
    attempt = bench.attempt("--bandwidth", "8M", "--granularity", "4k", "--retry", "2", "--on-stall", "wait")
    wait_share(attempt, 50)
    kill(attempt.agent())
    attempt.outcome().succeeded()
    assert "trying again in 1 s (1 of 2)" in attempt.said
    attempt.assert_destination_has_it()


def test_a_copy_that_was_interrupted_goes_on(bench: Bench) -> None:
    guest = bench.guest()
    attempt = Attempt(bench.lab, guest, "--bandwidth", "4M", verb="copy", launch=False)
    wait_share(attempt, 50)
    command("set", attempt.job(), "--bandwidth", "2M", "--downtime", "77").succeeded()
    attempt.signal(signal.SIGKILL)
    attempt.outcome()
    told = command("status", attempt.job(), "--output", "json").succeeded().result
    assert (told["state"], told["bandwidth"], told["downtime"]) == ("suspended", 2 * MIB, 0.077)
    (disk,) = resumed(attempt, "--bandwidth", "1000")["disks"]
    assert disk["resumed"] >= 7 * MIB
    guest.pause()
    copied = replace(guest.disks[0], path=bench.lab.target / guest.disks[0].path.name)
    assert_records_sound(copied)
    guest.resume()
    assert_nothing_left(bench.lab, guest)


def fill(ballast: Path) -> None:
    """Fill the file system on which `ballast` lies, by that."""
    ballast.write_bytes(bytes(64 << 10))
    with contextlib.suppress(OSError), ballast.open("ab") as file:
        while True:
            file.write(bytes(4096))
            file.flush()


def test_nothing_relies_on_a_journal_that_cannot_be_written(bench: Bench) -> None:
    bench.guest()
    with file_system(bench.lab.state, 4 * MIB):
        fill(bench.lab.state / "ballast")
        bench.attempt().outcome().failed(3, "cannot make the job's directory", "No space left on device")
        (bench.lab.state / "ballast").unlink()
        attempt = bench.attempt("--bandwidth", "4M")
        wait_share(attempt, 20)
        fill(bench.lab.state / "ballast")
        wait_share(attempt, 80)
        kill(attempt.agent())
        outcome = attempt.outcome()
        assert outcome.code in (1, 4), outcome
        (bench.lab.state / "ballast").unlink()
        resumed(attempt, "--bandwidth", "1000")
        attempt.assert_destination_has_it()


@pytest.mark.parametrize("source", ["ended", "is still there", *also("is still there, and resume was tried")])
def test_images_onto_which_somebody_else_has_moved_the_guest_stay_when_the_job_is_given_up(
    bench: Bench, source: str
) -> None:
    attempt = bench.attempt_at("copied")
    attempt.signal(signal.SIGHUP)
    attempt.outcome().failed(129)
    there = moved_otherwise(attempt)
    if source == "ended":
        attempt.source.kill()
    elif source != "is still there":
        command("resume", attempt.job()).failed(3)
    outcome = command("cleanup", attempt.job()).succeeded()
    assert "what it wrote since is there alone" in outcome.stdout
    assert "nothing of it is left" not in outcome.stdout
    assert_records_sound(there.disks[0], there.acked())
    attempt.source.kill()
    assert not list(attempt.lab.target.glob(".*-hashes"))


@pytest.mark.parametrize("kind", ["qcow2", *also("raw")])
def test_images_that_nobody_has_written_to_since_go_although_the_source_has_ended(bench: Bench, kind: str) -> None:
    attempt = bench.attempt_at("copied", kind=kind)
    attempt.signal(signal.SIGHUP)
    attempt.outcome().failed(129)
    attempt.source.kill()
    command("cleanup", attempt.job()).succeeded()
    assert not list(attempt.lab.target.iterdir())


def test_a_disk_that_was_resized_meanwhile_is_told_with_what_can_be_done(bench: Bench) -> None:
    attempt = bench.attempt_at("copied")
    attempt.signal(signal.SIGHUP)
    attempt.outcome().failed(129)
    attempt.source.execute("block_resize", {"node-name": NODE, "size": 32 * MIB})
    job = attempt.job()
    told = command("resume", job).failed(3, "was resized", "if that can be mended: qemu-blkmig resume")
    assert f"else qemu-blkmig cleanup {job} removes what is left, to begin anew" in told.stderr
    command("cleanup", job).succeeded()
    assert attempt.source.status() == "running"
    assert not list(attempt.lab.target.iterdir())
    attempt.source.kill()


def moved_otherwise(attempt: Attempt) -> Guest:
    """Move the guest to the images at the destination by QEMU's own migration; there it writes, and its QEMU ends."""
    source, there = attempt.source, attempt.destination
    place = attempt.lab.directory / "way"
    with subprocess.Popen([*there.arguments(), "-incoming", f"unix:{place}"]):
        wait_until(place.exists, "the QEMU there", 20)
        source.pause()
        for old, new in zip(source.disks, there.disks, strict=True):
            shutil.copyfile(old.path, new.path)
        source.execute("migrate", {"uri": f"unix:{place}"})
        wait_until(lambda: there.status() == "paused", "the guest there", 20)
        there.resume()
        there.wait_for_writing(more=20)
        there.kill()
    return there
