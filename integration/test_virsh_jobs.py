"""Backups and block jobs of libvirt's on a domain that moves: nothing is thrown away for them, and no write lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from integration.lab import LabError, wait_until
from integration.luck import kill_all
from integration.processes import WATCHDOG
from integration.thorough import also
from integration.virtlab import IMAGES, Domain, VirtLab

MIB = 1 << 20
HERE = "the guest runs at the source"


@pytest.fixture
def full(virtlab: VirtLab) -> Iterator[Domain]:
    """A guest of whose disk 512 MiB are data: to read it all takes longer than to slow that down.

    A backup has 64 MiB and more under way when it is told to.
    """
    booted = virtlab.boot(virtlab.disk("jobs.qcow2", 768 * MIB, data=[(64 * MIB, 512 * MIB)]))
    yield booted
    booted.destroy()
    virtlab.put_in_order()
    for far in (False, True):
        for left in virtlab.outside(IMAGES, far=far).glob("*jobs*"):
            left.unlink()


def backup_begins(virtlab: VirtLab, domain: Domain, mode: Literal["push", "pull"]) -> None:
    """Begin a backup that lasts until it is aborted."""
    (drive,) = qmp(virtlab, domain, "query-block")
    job = f"backup-vda-{drive['inserted']['node-name']}"
    slow = json.dumps({"execute": "block-job-set-speed", "arguments": {"device": job, "speed": 65536}})
    begin = f"backup-begin {domain.name} --backupxml {virtlab.backup(IMAGES / f'jobs.{mode}', mode)}"
    virtlab.hosts.virsh(begin if mode == "pull" else f"{begin}; qemu-monitor-command {domain.name} '{slow}'")
    assert [each["type"] for each in qmp(virtlab, domain, "query-jobs")] == ["backup"]


def copying_begins(virtlab: VirtLab, domain: Domain) -> None:
    """Begin a copy job that lasts until it is aborted."""
    dest = IMAGES / "jobs.copy"
    virtlab.hosts.virsh("blockcopy", domain.name, "vda", "--dest", dest, "--transient-job", "--bandwidth", 1)


def qmp(virtlab: VirtLab, domain: Domain, command: str) -> list[dict[str, Any]]:
    """What QEMU returns."""
    told = virtlab.hosts.virsh("qemu-monitor-command", domain.name, json.dumps({"execute": command}))
    found: list[dict[str, Any]] = json.loads(told)["return"]
    return found


def no_jobs(virtlab: VirtLab, domain: Domain) -> None:
    wait_until(lambda: not qmp(virtlab, domain, "query-jobs"), "the end of the job", 30)


def suspended(virtlab: VirtLab, domain: Domain) -> str:
    """A job whose disk has been copied, suspended by what has nothing to do with the disk."""
    attempt = virtlab.attempt(domain, hold="copied")
    attempt.wait_held()
    attempt.signal(signal.SIGHUP)
    attempt.outcome().failed(128 + signal.SIGHUP, now=HERE)
    return virtlab.job()


def goes_on(virtlab: VirtLab, domain: Domain, job: str, *options: str) -> None:
    """Resume the job to its end; nothing of the bulk pass is copied again, and no record is lost."""
    (disk,) = virtlab.virsh("--resume", job, "--output", "json", *options).succeeded().result["disks"]
    assert options or disk["resumed"] == disk["virtual_size"]
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


@pytest.mark.parametrize("kind", ["push", *also("copy")])
def test_a_job_that_begins_while_the_disk_is_copied_costs_nothing_of_what_was_copied(
    virtlab: VirtLab, full: Domain, kind: str
) -> None:
    attempt = virtlab.attempt(full, "--bandwidth", "32")
    attempt.wait_copying()
    if kind == "push":
        backup_begins(virtlab, full, "push")
        end, told = ["domjobabort", full.name], "(backup)"
    else:
        copying_begins(virtlab, full)
        end, told = ["blockjob", full.name, "vda", "--abort"], "(mirror)"
    outcome = attempt.outcome()
    job = virtlab.job()
    outcome.failed(1, f"{told} was started by somebody else", f"let it end: qemu-blkmig resume {job}", now=HERE)
    virtlab.virsh("--resume", job).failed(3, f"{told} is running: let it end", f"resume {job}")
    full.wait_for_writing(more=20)
    virtlab.hosts.virsh(*end)
    no_jobs(virtlab, full)
    full.wait_for_writing(more=20)
    goes_on(virtlab, full, job)


def test_a_backup_that_libvirt_would_have_to_wait_for_is_not_aborted(virtlab: VirtLab, full: Domain) -> None:
    attempt = virtlab.attempt(full, hold="to begin beforehand")
    attempt.wait_held()
    backup_begins(virtlab, full, "push")
    attempt.go_on()
    outcome = attempt.outcome()
    job = virtlab.job()
    outcome.failed(1, "(backup) was started by somebody else", f"let it end: qemu-blkmig resume {job}", now=HERE)
    assert [each["type"] for each in qmp(virtlab, full, "query-jobs")] == ["backup"]


def test_a_backup_that_has_begun_since_a_job_was_left_is_not_aborted_by_cleaning_up(
    virtlab: VirtLab, full: Domain
) -> None:
    attempt = virtlab.attempt(full, hold="behind the gate")
    attempt.wait_held()
    attempt.signal(signal.SIGSTOP)
    assert kill_all(*virtlab.processes(WATCHDOG, far=False))
    attempt.signal(signal.SIGKILL)
    attempt.outcome()
    wait_until(lambda: full.runs() == ["hosta"], "the guest to be given back", 60)
    backup_begins(virtlab, full, "push")
    virtlab.tool("cleanup", virtlab.job()).succeeded()
    assert [each["type"] for each in qmp(virtlab, full, "query-jobs")] == ["backup"]
    virtlab.hosts.virsh("domjobabort", full.name)
    no_jobs(virtlab, full)
    virtlab.assert_stayed(full)


def test_a_pull_backup_and_we_keep_out_of_each_other_s_way(virtlab: VirtLab, full: Domain) -> None:
    attempt = virtlab.attempt(full, hold="copied")
    attempt.wait_held()
    with pytest.raises(LabError, match="NBD server"):
        backup_begins(virtlab, full, "pull")
    attempt.signal(signal.SIGHUP)
    attempt.outcome().failed(128 + signal.SIGHUP, now=HERE)
    job = virtlab.job()
    backup_begins(virtlab, full, "pull")
    virtlab.virsh("--resume", job).failed(3, "(backup) is running: let it end", f"resume {job}")
    full.wait_for_writing(more=20)
    virtlab.hosts.virsh("domjobabort", full.name)
    no_jobs(virtlab, full)
    goes_on(virtlab, full, job)


def test_a_disk_that_was_moved_by_a_copy_job_and_back_is_not_gone_on_with(virtlab: VirtLab, full: Domain) -> None:
    job = suspended(virtlab, full)
    copy = ("blockcopy", full.name, "vda", "--transient-job", "--wait", "--pivot", "--dest")
    virtlab.hosts.virsh(*copy, IMAGES / "jobs.copy")
    virtlab.virsh("--resume", job).failed(3, now="what was copied is kept")
    full.wait_for_writing(more=20)
    virtlab.hosts.virsh(*copy, full.disks[0].path, "--reuse-external")
    changed = "its image or chain was changed while the job was suspended"
    virtlab.virsh("--resume", job).failed(3, changed, f"resume {job} --compare")
    goes_on(virtlab, full, job, "--compare")


def test_a_snapshot_that_is_committed_back_while_the_job_is_suspended_loses_no_write(
    virtlab: VirtLab, full: Domain
) -> None:
    job = suspended(virtlab, full)
    virtlab.hosts.virsh("snapshot-create-as", full.name, "jobs", "--disk-only", "--no-metadata")
    full.wait_for_writing(more=20)
    virtlab.virsh("--resume", job).failed(3, now="what was copied is kept")
    virtlab.hosts.virsh("blockcommit", full.name, "vda", "--active", "--wait", "--pivot")
    full.wait_for_writing(more=20)
    goes_on(virtlab, full, job)
