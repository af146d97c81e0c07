"""What goes wrong while a domain moves: it runs on exactly one host afterwards, and the message says on which."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from integration.hosts import ADDRESSES
from integration.lab import LabError, assert_records_sound, wait_until
from integration.listened import Listened
from integration.thorough import also
from integration.virtlab import Domain, VirtLab
from qemu_blkmig.job.sharing import FOLDER, Circle

HERE = "the guest runs at the source"
THERE = "the guest runs at the destination"
BEFORE = ["prepared", "connected"]
BEFOREHAND = "begun beforehand"
"""libvirt has begun with the first pass: the destination's QEMU starts, hardly anything of RAM has crossed."""
GATE_CLOSED = ["behind the gate", "last round over", "closed"]
"""The guest stands still, and libvirt waits for what the gate withholds."""


def begun(virtlab: VirtLab, domain: Domain, moment: str) -> Listened:
    """A run that is held at the moment, for which libvirt has begun beforehand: the destination's QEMU is there."""
    attempt = virtlab.attempt(domain, hold=moment)
    attempt.wait_held()
    wait_until(lambda: domain.state(far=True) == "paused", "libvirt to have begun", 10)
    return attempt


@pytest.mark.parametrize(
    "moment", [BEFOREHAND, "behind the gate", "last round over", *also(*BEFORE, "copied", "closed")]
)
def test_a_coordinator_killed_before_the_gate_opens_leaves_the_guest_at_the_source(
    virtlab: VirtLab, domain: Domain, moment: str
) -> None:
    attempt = virtlab.attempt(domain, hold=moment)
    attempt.wait_held()
    attempt.signal(signal.SIGKILL)
    assert HERE in attempt.outcome().stderr
    if moment not in BEFORE:
        virtlab.tool("cleanup", virtlab.job()).succeeded()
    virtlab.assert_nothing_left()
    assert not virtlab.images_there(domain)
    virtlab.assert_stayed(domain)


@pytest.mark.parametrize("moment", ["gate to be opened", "gate open", "handed over", *also("decided")])
def test_a_coordinator_killed_once_the_gate_is_open_leaves_the_guest_on_exactly_one_host(
    virtlab: VirtLab, domain: Domain, moment: str
) -> None:
    attempt = virtlab.attempt(domain, hold=moment)
    attempt.wait_held()
    attempt.signal(signal.SIGKILL)
    told = attempt.outcome().stderr
    if domain.runs() == ["hosta"]:
        assert HERE in told and moment in ("gate to be opened", "gate open")
        virtlab.assert_stayed(domain)
    else:
        assert THERE in told and moment != "gate to be opened"
        virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


@pytest.mark.parametrize("moment", ["last round over", *also(BEFOREHAND, "copied")])
def test_the_destination_s_libvirtd_killed_before_the_gate_opens(virtlab: VirtLab, domain: Domain, moment: str) -> None:
    attempt = virtlab.attempt(domain, hold=moment)
    attempt.wait_held()
    virtlab.hosts.stop_libvirtd(far=True)
    attempt.go_on()
    outcome = attempt.outcome()
    virtlab.hosts.start_libvirtd(far=True)
    outcome.failed(1, "libvirt", now=HERE)
    virtlab.tool("cleanup", virtlab.job()).succeeded()
    virtlab.assert_nothing_left()
    wait_until(lambda: domain.state(far=True) is None, "hostb to forget it", 90)
    virtlab.assert_stayed(domain)


def test_the_source_s_libvirtd_restarted_in_bulk_and_the_job_resumed(virtlab: VirtLab, domain: Domain) -> None:
    attempt = virtlab.attempt(domain, hold="copied")
    attempt.wait_held()
    virtlab.hosts.stop_libvirtd(far=False)
    virtlab.hosts.start_libvirtd(far=False)
    attempt.go_on()
    outcome = attempt.outcome()
    outcome.failed(1, "the source's libvirt is gone", now=HERE)
    resumed = virtlab.virsh("--resume", virtlab.job(), "--output", "json").succeeded().result
    (disk,) = resumed["disks"]
    assert disk["resumed"] == disk["virtual_size"]
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


def test_a_domain_that_was_named_by_its_id_is_known_when_it_was_started_anew(virtlab: VirtLab, domain: Domain) -> None:
    number = virtlab.hosts.virsh("domid", domain.name).strip()
    # QEMU cannot listen there.
    words = number, virtlab.target, "--migrateuri", "tcp://hostb:2222"
    virtlab.virsh(*words, "--on-stall", "pause").failed(1, "Address already in use", now=HERE)
    virtlab.hosts.virsh("destroy", domain.name)
    virtlab.hosts.virsh("start", domain.name)
    job = virtlab.job()
    # Its QEMU is another one, whose bitmaps know nothing; but it is found.
    virtlab.virsh("--resume", job).failed(3, f"qemu-blkmig resume {job} --compare")
    virtlab.tool("cleanup", job).succeeded()
    assert not virtlab.images_there(domain)
    virtlab.assert_nothing_left()


def test_xml_that_a_device_plugged_in_meanwhile_makes_useless_is_replaced_and_nothing_copied_again(
    virtlab: VirtLab, domain: Domain
) -> None:
    given, mouse = virtlab.hosts.near / "given.xml", virtlab.hosts.near / "mouse.xml"

    def dump() -> None:
        given.write_text(virtlab.hosts.virsh("dumpxml", domain.name, "--migratable"))

    dump()
    mouse.write_text("<input type='mouse' bus='usb'/>")
    attempt = virtlab.attempt(domain, "--xml", given, hold="copied")
    attempt.wait_held()
    virtlab.hosts.virsh("attach-device", domain.name, mouse)
    attempt.go_on()
    job = virtlab.job()
    outcome = attempt.outcome()
    outcome.failed(1, "does not match source", f"virsh-blkmigrate --resume {job} --xml FILE", now=HERE)
    outcome = virtlab.virsh("--resume", job)
    outcome.failed(3, "does not match source", f"virsh-blkmigrate --resume {job} --xml FILE", now=HERE)
    dump()
    path, fitting = str(domain.disks[0].path), given.read_text()
    given.write_text(fitting.replace(path, "/elsewhere"))
    virtlab.virsh("--resume", job, "--xml", given).failed(
        3, f"the XML says /elsewhere, but what was copied lies in {path}"
    )
    given.write_text(fitting)
    resumed = virtlab.virsh("--resume", job, "--xml", given, "--output", "json").succeeded().result
    (disk,) = resumed["disks"]
    assert disk["resumed"] == disk["virtual_size"]
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


def test_a_copy_of_a_disk_that_is_unplugged_before_the_job_goes_on_is_told_to_stay_there(virtlab: VirtLab) -> None:
    domain = virtlab.boot(*(virtlab.disk(f"{uuid.uuid4()}.qcow2", 64 << 20, data=[(0, 1 << 20)]) for _ in range(2)))
    attempt = virtlab.attempt(domain, "--source-images", "delete", hold="copied")
    attempt.wait_held()
    for pid in virtlab.hosts.connections():
        os.kill(pid, signal.SIGKILL)
    attempt.go_on()
    attempt.outcome().failed(1, now=HERE)
    virtlab.hosts.virsh("detach-disk", domain.name, "vdb")
    wait_until(lambda: "vdb" not in virtlab.hosts.virsh("domblklist", domain.name), "vdb to be unplugged", 20)
    result = virtlab.virsh("--resume", virtlab.job(), "--output", "json").succeeded().result
    own, other = domain.disks
    assert any("unplugged" in told and told.endswith(f": {other.path}") for told in result["warnings"]), result
    assert virtlab.outside(other.path, far=False).exists() and not virtlab.outside(own.path, far=False).exists()
    virtlab.assert_arrived(replace(domain, disks=(own,)))
    virtlab.assert_nothing_left()


def in_step(virtlab: VirtLab, domain: Domain, *options: str) -> Listened:
    """A run whose disks are kept in step until somebody has it switch over."""
    attempt = virtlab.attempt(domain, "--switchover", "manual", *options)
    attempt.wait_event(lambda event: event.get("stage") == "standby", "its disks to be in step")
    return attempt


def test_what_an_admin_changes_of_a_domain_whose_disks_are_kept_in_step_comes_along(
    virtlab: VirtLab, domain: Domain
) -> None:
    attempt = in_step(virtlab, domain, "--persistent", "--undefinesource")
    for words in (
        ("desc", domain.name, "--title", "new"),
        ("blkdeviotune", domain.name, "vda", "--write-iops-sec", 5000),
    ):
        virtlab.hosts.virsh(*words, "--live", "--config")
    virtlab.tool("switchover", virtlab.job()).succeeded()
    attempt.outcome().succeeded()
    for which in ((), ("--inactive",)):
        xml = virtlab.hosts.virsh("dumpxml", domain.name, *which, far=True)
        assert "<title>new</title>" in xml and "<write_iops_sec>5000<" in xml
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


def test_a_migration_of_somebody_else_s_does_not_start_the_guest_from_incomplete_copies(
    virtlab: VirtLab, domain: Domain
) -> None:
    attempt = in_step(virtlab, domain)
    wait_until(lambda: domain.state(far=True) is None, "what was begun beforehand to be called off", 20)
    with pytest.raises(LabError, match='Failed to get "write" lock'):
        virtlab.hosts.virsh("migrate", "--live", "--unsafe", domain.name, virtlab.target)
    attempt.outcome().failed(1, "somebody else migrates the guest away", now=HERE)
    virtlab.assert_stayed(domain)
    virtlab.assert_nothing_left()


def test_nor_does_it_when_the_coordinator_is_killed_meanwhile(virtlab: VirtLab, domain: Domain) -> None:
    attempt = in_step(virtlab, domain)
    wait_until(lambda: domain.state(far=True) is None, "what was begun beforehand to be called off", 20)
    migrate = [*virtlab.hosts.enter, "virsh", "migrate", "--live", "--unsafe", domain.name, virtlab.target]
    with subprocess.Popen(migrate, stderr=subprocess.PIPE, text=True) as theirs:
        wait_until(lambda: domain.state(far=True) is not None, "their QEMU", 20)
        attempt.signal(signal.SIGKILL)
        _, told = theirs.communicate()
    assert theirs.returncode == 1 and 'Failed to get "write" lock' in told, told
    attempt.outcome()
    virtlab.cleaned_up()
    virtlab.assert_nothing_left()
    assert not virtlab.images_there(domain)
    virtlab.assert_stayed(domain)


def assert_all_is_there(virtlab: VirtLab, domain: Domain, *, far: bool) -> None:
    """On that host's image, of a guest that is off by now, lies what it wrote on either."""
    (disk,) = domain.disks
    image = replace(disk, path=virtlab.outside(disk.path, far=far))
    assert_records_sound(image, max(domain.acked(), domain.acked(far=True)))


def suspended_and_moved_by_virsh(virtlab: VirtLab, domain: Domain, way: Sequence[str]) -> None:
    """A job rests; meanwhile virsh migrates the guest onto its images, where it writes, and is shut off."""
    attempt = virtlab.attempt(domain, hold="copied")
    attempt.wait_held()
    attempt.signal(signal.SIGHUP)
    attempt.outcome().failed(128 + signal.SIGHUP, now=HERE)
    virtlab.hosts.virsh("migrate", "--unsafe", "--copy-storage-all", *way, domain.name, virtlab.target)
    domain.wait_for_writing(far=True, more=20)
    virtlab.hosts.virsh("destroy", domain.name, far=True)


@pytest.mark.parametrize(("way", "ending"), [((), "resume"), (("--persistent", "--undefinesource"), "cleanup")])
def test_images_onto_which_somebody_else_has_moved_the_guest_stay_when_the_job_is_given_up(
    virtlab: VirtLab, domain: Domain, way: tuple[str, ...], ending: str
) -> None:
    suspended_and_moved_by_virsh(virtlab, domain, way)
    outcome = virtlab.tool(ending, virtlab.job())
    told = outcome.stderr + outcome.stdout
    assert "somebody else may have moved it away" in told and "nothing was removed" in told, told
    assert "--offline" not in told and "hold all" not in told, told
    assert_all_is_there(virtlab, domain, far=True)
    virtlab.assert_nothing_left()


@pytest.mark.parametrize(
    ("way", "ending"), [((), "cleanup"), (("--undefinesource",), "cleanup"), (("--undefinesource",), "resume")]
)
def test_they_stay_too_when_the_source_s_libvirt_does_not_know_any_more_that_it_has_moved_it(
    virtlab: VirtLab, domain: Domain, way: tuple[str, ...], ending: str
) -> None:
    suspended_and_moved_by_virsh(virtlab, domain, way)
    virtlab.hosts.stop_libvirtd(far=False)
    virtlab.hosts.start_libvirtd(far=False)
    outcome = virtlab.tool(ending, virtlab.job())
    told = outcome.stderr + outcome.stdout
    assert ending == "resume" or "images were left at the destination" in told, told
    assert_all_is_there(virtlab, domain, far=True)
    virtlab.cleaned_up()
    assert virtlab.images_there(domain)
    virtlab.assert_nothing_left()


@pytest.mark.parametrize("paused", [True, False])
def test_a_guest_that_came_back_before_its_job_was_cleaned_up_is_left_alone(
    virtlab: VirtLab, domain: Domain, *, paused: bool
) -> None:
    attempt = virtlab.attempt(domain, "--source-images", "delete", hold="decided")
    attempt.wait_held()
    virtlab.hosts.stop_libvirtd(far=True)
    for pid in virtlab.hosts.connections():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    attempt.signal(signal.SIGKILL)
    assert f"qemu-blkmig cleanup {virtlab.job()}" in attempt.outcome().stderr
    virtlab.hosts.start_libvirtd(far=True)
    assert domain.runs() == ["hostb"]
    back = ("migrate", "--live", "--unsafe", "--copy-storage-all", "--persistent", "--undefinesource", domain.name)
    uri = f"tcp://{ADDRESSES['hosta']}"
    virtlab.hosts.run("virsh", "-c", virtlab.target, *back, "qemu:///system", "--migrateuri", uri)
    if paused:
        virtlab.hosts.virsh("suspend", domain.name)
    told = virtlab.tool("cleanup", virtlab.job()).succeeded().stdout
    assert "came back" in told and "left alone" in told, told
    assert domain.state() == ("paused" if paused else "running")
    virtlab.hosts.virsh("destroy", domain.name)
    assert_all_is_there(virtlab, domain, far=False)
    virtlab.assert_nothing_left()


def test_the_source_s_libvirtd_killed_while_the_gate_is_closed(virtlab: VirtLab, domain: Domain) -> None:
    attempt = virtlab.attempt(domain, hold="last round over")
    attempt.wait_held()
    virtlab.hosts.stop_libvirtd(far=False)
    attempt.go_on()
    virtlab.hosts.start_libvirtd(far=False)
    outcome = attempt.outcome()
    wait_until(lambda: domain.runs() == ["hosta"], "the guest", 60, lambda: outcome.stderr)
    virtlab.cleaned_up()
    virtlab.assert_nothing_left()
    virtlab.assert_stayed(domain)


@pytest.mark.parametrize("moment", ["converged", "behind the gate", "closed"])
def test_ssh_that_breaks_before_the_gate_opens_leaves_the_guest_at_the_source(
    virtlab: VirtLab, domain: Domain, moment: str
) -> None:
    attempt = virtlab.attempt(domain, hold=moment)
    attempt.wait_held()
    for pid in virtlab.hosts.connections():
        os.kill(pid, signal.SIGKILL)
    attempt.go_on()
    attempt.outcome().failed(1, now=HERE)
    virtlab.cleaned_up()
    virtlab.assert_nothing_left()
    virtlab.assert_stayed(domain)


@pytest.mark.parametrize("moment", ["converged", "last round over"])
def test_a_domain_that_is_destroyed_meanwhile_is_told(virtlab: VirtLab, domain: Domain, moment: str) -> None:
    attempt = virtlab.attempt(domain, hold=moment)
    attempt.wait_held()
    virtlab.hosts.virsh("destroy", domain.name)
    attempt.go_on()
    attempt.outcome().failed(1, now="the domain does not run at the source any more")
    virtlab.cleaned_up()
    virtlab.assert_nothing_left()
    assert domain.runs() == []
    assert domain.state(far=True) is None


def test_a_guest_that_crashes_and_is_kept_so_is_told_and_rid_of_what_is_ours(virtlab: VirtLab) -> None:
    told = "<qemu:arg value='-device'/><qemu:arg value='pvpanic-pci,bus=pcie.0,addr=0x1d'/></qemu:commandline>"

    def alter(xml: str) -> str:
        kept = xml.replace("<devices>", "<on_crash>preserve</on_crash><devices>")
        return kept.replace("</qemu:commandline>", told)

    domain = virtlab.boot(virtlab.disk("crashes.qcow2", 64 << 20, data=[(0, 1 << 20)]), alter=alter)
    attempt = virtlab.attempt(domain, hold="copied")
    attempt.wait_held()
    wait_until(lambda: domain.state(far=True) is None, "what was begun beforehand to be called off", 20)
    virtlab.hosts.virsh("send-key", domain.name, "KEY_LEFTALT", "KEY_SYSRQ", "KEY_C")
    attempt.outcome().failed(1, "the guest crashed", now="the guest is at the source, crashed")
    assert domain.state() == "crashed"
    asked = '{"execute": "query-named-block-nodes"}', '{"execute": "query-block-exports"}'
    nodes, exports = (virtlab.hosts.virsh("qemu-monitor-command", domain.name, each) for each in asked)
    assert "blkmig" not in nodes and json.loads(exports)["return"] == []
    virtlab.assert_nothing_left()
    assert not virtlab.images_there(domain)
    domain.destroy()


def test_a_snapshot_taken_meanwhile_ends_the_job(virtlab: VirtLab, domain: Domain) -> None:
    attempt = virtlab.attempt(domain, hold="copied")
    attempt.wait_held()
    virtlab.hosts.virsh("snapshot-create-as", domain.name, "s1", "--disk-only", "--no-metadata")
    attempt.go_on()
    attempt.outcome().failed(1, "snapshot", now=HERE)
    virtlab.cleaned_up()
    virtlab.assert_nothing_left()
    assert domain.runs() == ["hosta"]


@pytest.mark.parametrize("moment", ["behind the gate", *also(BEFOREHAND)])
def test_ctrl_c_behind_the_gate_gives_the_guest_back(virtlab: VirtLab, domain: Domain, moment: str) -> None:
    attempt = virtlab.attempt(domain, hold=moment)
    attempt.wait_held()
    attempt.signal(signal.SIGINT)
    outcome = attempt.outcome()
    outcome.failed(128 + signal.SIGINT, "interrupted", now=HERE)
    virtlab.cleaned_up()
    virtlab.assert_nothing_left()
    virtlab.assert_stayed(domain)


def test_what_libvirt_began_too_early_is_called_off_and_the_domain_moves_when_it_is_time(
    virtlab: VirtLab, domain: Domain
) -> None:
    attempt = begun(virtlab, domain, "copied")
    wait_until(lambda: domain.state(far=True) is None, "it to be called off", 30)
    assert domain.runs() == ["hosta"]
    assert "None" in virtlab.hosts.virsh("domjobinfo", domain.name)
    domain.wait_for_writing(more=20)
    attempt.go_on()
    attempt.outcome().succeeded()
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


def test_nothing_begins_while_a_job_waits_for_its_slot(virtlab: VirtLab, domain: Domain) -> None:
    state = virtlab.hosts.near / "state"
    taken = Circle(state / FOLDER / "slots").join("another", 1)
    assert taken is not None
    attempt = virtlab.attempt(domain, "--slots", 1)
    attempt.wait_event(lambda event: "waits for a slot" in event.get("text", ""), "it to wait")
    for _ in range(20):
        assert domain.state(far=True) is None
        time.sleep(0.1)
    os.close(taken)
    attempt.outcome().succeeded()
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


def test_what_only_the_start_of_the_destination_s_qemu_tells_ends_a_long_copy_at_its_begin(virtlab: VirtLab) -> None:
    disk = virtlab.disk("port.qcow2", 128 << 20, data=[(1 << 20, 64 << 20)])
    display = "<graphics type='vnc' port='5999' autoport='no' listen='127.0.0.1'/></devices>"
    domain = virtlab.boot(disk, alter=lambda xml: xml.replace("</devices>", display))
    listen = (
        "import socket, sys; taken = socket.create_server(('127.0.0.1', 5999)); print(flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*virtlab.hosts.enter_far, sys.executable, "-c", listen], **pipes) as holder:  # type: ignore[call-overload]
        holder.stdout.readline()
        outcome = virtlab.migrate(domain, "--bandwidth", "1")
        holder.stdin.close()
    outcome.failed(1, "Address already in use", "qemu-blkmig resume", now=HERE)
    assert domain.state(far=True) is None
    domain.wait_for_writing(more=20)
    virtlab.tool("resume", virtlab.job(), "--bandwidth", "1000").succeeded()
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


def test_a_migration_that_is_aborted_before_it_is_time_is_not_tried_again(virtlab: VirtLab, domain: Domain) -> None:
    attempt = virtlab.attempt(domain, hold=BEFOREHAND)
    attempt.wait_held()
    virtlab.hosts.virsh("domjobabort", domain.name)
    wait_until(lambda: domain.state(far=True) is None, "hostb to forget it", 90)
    attempt.go_on()
    attempt.outcome().failed(1, "canceled by client", now=HERE)
    virtlab.cleaned_up()
    virtlab.assert_nothing_left()
    virtlab.assert_stayed(domain)


@pytest.mark.parametrize("moment", [BEFOREHAND, "copied"])
def test_a_guest_that_an_admin_pauses_while_libvirt_waits_stays_paused(
    virtlab: VirtLab, domain: Domain, moment: str
) -> None:
    attempt = begun(virtlab, domain, moment)
    virtlab.hosts.virsh("suspend", domain.name)
    attempt.go_on()
    outcome = attempt.outcome().succeeded()
    assert domain.state(far=True) == "paused", outcome.stderr + outcome.stdout
    assert "the guest is paused at the destination" in outcome.stdout
    virtlab.hosts.virsh("resume", domain.name, far=True)
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


def test_a_guest_that_an_admin_pauses_stays_so_when_what_libvirt_began_too_early_is_called_off(
    virtlab: VirtLab, domain: Domain
) -> None:
    attempt = begun(virtlab, domain, "copied")
    virtlab.hosts.virsh("suspend", domain.name)
    wait_until(lambda: domain.state(far=True) is None, "it to be called off", 30)
    assert domain.state() == "paused"
    attempt.go_on()
    attempt.outcome().succeeded()
    assert domain.state(far=True) == "paused"
    virtlab.hosts.virsh("resume", domain.name, far=True)
    virtlab.assert_arrived(domain)


@pytest.mark.parametrize("aborted", [False, *also(True)])
def test_a_guest_that_an_admin_pauses_stays_so_when_libvirt_s_migration_fails_by_itself(
    virtlab: VirtLab, domain: Domain, aborted: bool
) -> None:
    attempt = begun(virtlab, domain, BEFOREHAND)
    virtlab.hosts.virsh("suspend", domain.name)
    if aborted:
        virtlab.hosts.virsh("domjobabort", domain.name)
    else:
        # What has ended by that may be gone before it is said to be.
        with contextlib.suppress(LabError):
            virtlab.hosts.virsh("destroy", domain.name, far=True)
    wait_until(lambda: domain.runs() == ["hosta"], "libvirt to resume it", 30)
    attempt.go_on()
    if aborted:
        attempt.outcome().failed(1, "canceled by client", now="the guest is at the source, paused")
        virtlab.cleaned_up()
        assert domain.state() == "paused"
        virtlab.hosts.virsh("resume", domain.name)
        virtlab.assert_stayed(domain)
    else:
        attempt.outcome().succeeded()
        assert domain.state(far=True) == "paused"
        virtlab.hosts.virsh("resume", domain.name, far=True)
        virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


def test_a_guest_that_an_admin_pauses_stays_so_when_the_coordinator_dies(virtlab: VirtLab, domain: Domain) -> None:
    attempt = begun(virtlab, domain, BEFOREHAND)
    wait_until(lambda: "Memory processed" in virtlab.hosts.virsh("domjobinfo", domain.name), "RAM to cross", 10)
    virtlab.hosts.virsh("suspend", domain.name)
    record = virtlab.hosts.near / "state" / virtlab.job() / "record.json"
    wait_until(lambda: not json.loads(record.read_text())["was_running"], "it to be noted", 10)
    attempt.signal(signal.SIGKILL)
    assert "the guest is at the source, paused" in attempt.outcome().stderr
    assert domain.state() == "paused"
    virtlab.cleaned_up()
    virtlab.hosts.virsh("resume", domain.name)
    virtlab.assert_stayed(domain)
    virtlab.assert_nothing_left()


@contextlib.contextmanager
def begun_in_vain(virtlab: VirtLab, domain: Domain) -> Iterator[tuple[Listened, Path]]:
    """A run whose guest an admin has paused, and whose attempt, called off, libvirt cannot end as long as the file is
    there: a hook of hostb's waits for that.
    """
    hosts = virtlab.hosts
    waits, waiting = hosts.far / "hook.waits", hosts.far / "hook.waiting"
    hook = hosts.far / "libvirt/etc/hooks/qemu"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(
        f'#!/bin/sh\n[ "$2" = prepare ] && touch {waiting} && while [ -e {waits} ]; do sleep 0.2; done\nexit 0\n'
    )
    hook.chmod(0o755)
    waiting.unlink(missing_ok=True)
    waits.touch()
    hosts.stop_libvirtd(far=True)
    hosts.start_libvirtd(far=True)
    try:
        attempt = virtlab.attempt(domain, hold="copied")
        attempt.wait_held()
        wait_until(waiting.exists, "hostb's libvirt to prepare", 20)
        hosts.virsh("suspend", domain.name)
        attempt.wait_event(lambda event: "has not ended yet" in event.get("text", ""), "it to be called off in vain")
        yield attempt, waits
    finally:
        waits.unlink(missing_ok=True)
        hook.unlink()
        hosts.stop_libvirtd(far=True)
        hosts.start_libvirtd(far=True)


@pytest.mark.thorough
def test_a_migration_that_libvirt_cannot_end_for_minutes_costs_no_copies(virtlab: VirtLab, domain: Domain) -> None:
    with begun_in_vain(virtlab, domain) as (attempt, waits):
        attempt.go_on()
        time.sleep(2)
        waits.unlink()
        attempt.outcome().succeeded()
    assert domain.state(far=True) == "paused"
    virtlab.hosts.virsh("resume", domain.name, far=True)
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


@pytest.mark.thorough
@pytest.mark.parametrize("seconds", [3, None], ids=["while it settles", "later"])
def test_a_guest_that_an_admin_pauses_stays_so_when_libvirt_ends_only_after_the_job(
    virtlab: VirtLab, domain: Domain, seconds: float | None
) -> None:
    with begun_in_vain(virtlab, domain) as (attempt, waits):
        attempt.signal(signal.SIGINT)
        if seconds is not None:
            time.sleep(seconds)
            waits.unlink()
        outcome = attempt.outcome()
    code = 4 if seconds is None else 128 + signal.SIGINT
    outcome.failed(code, "interrupted", now="the guest is at the source, paused")
    assert ("libvirt has not ended its migration" in outcome.stderr) is (seconds is None)
    wait_until(lambda: not virtlab.jobs(), "the watchdog to settle it", 90)
    assert "None" in virtlab.hosts.virsh("domjobinfo", domain.name)
    assert domain.state() == "paused", outcome.stderr
    virtlab.hosts.virsh("resume", domain.name)
    virtlab.assert_stayed(domain)
    virtlab.assert_nothing_left()


@pytest.fixture
def firmware(virtlab: VirtLab) -> Iterator[Domain]:
    """A guest with hardly any RAM: of its firmware only, which finds nothing to boot."""
    disk = virtlab.disk("firmware.qcow2", 16 << 20, data=[(1 << 20, 1 << 20)])
    xml = virtlab.hosts.near / "firmware.xml"
    xml.write_text(
        "<domain type='qemu'><name>firmware</name><memory unit='MiB'>16</memory>"
        "<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os><features><acpi/></features><devices>"
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk.path}'/>"
        "<target dev='vda' bus='virtio'/></disk><memballoon model='none'/></devices></domain>"
    )
    virtlab.hosts.virsh("define", xml)
    virtlab.hosts.virsh("start", "firmware")
    domain = Domain(virtlab, "firmware", (disk,))
    yield domain
    domain.destroy()
    virtlab.put_in_order()


def test_a_guest_whose_ram_waits_in_sockets_is_not_handed_over_to_nobody(virtlab: VirtLab, firmware: Domain) -> None:
    told = "the guest's RAM", "what was copied is kept"
    virtlab.migrate(firmware, "--migrateuri", "tcp://10.77.0.99:49155").failed(1, *told, now=HERE)
    assert firmware.runs() == ["hosta"] and virtlab.images_there(firmware)
    virtlab.cleaned_up()
    virtlab.assert_nothing_left()


def test_a_guest_with_hardly_any_ram_is_not_paused_before_its_disks_are_copied(
    virtlab: VirtLab, firmware: Domain
) -> None:
    domain = firmware
    attempt = virtlab.attempt(domain, hold="copied")
    attempt.wait_held()
    seen = set()

    def called_off() -> bool:
        seen.add((domain.state(), there := domain.state(far=True)))
        return there is None and len(seen) > 1

    wait_until(called_off, "libvirt's migration to begin and to be called off", 30)
    assert {here for here, _ in seen} == {"running"}
    attempt.go_on()
    attempt.outcome().succeeded()
    assert domain.runs() == ["hostb"]
