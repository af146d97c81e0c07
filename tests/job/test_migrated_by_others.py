"""A guest that somebody else migrates away meanwhile: it runs elsewhere then, and must not be started here again."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qemu_blkmig.cli.clock import RealClock
from qemu_blkmig.errors import GuestStateError, RequestError
from qemu_blkmig.job import lifecycle
from qemu_blkmig.job.copy import copy
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.options import CopyOptions, Target, Transfer
from qemu_blkmig.job.place import Local
from qemu_blkmig.job.record import Job
from qemu_blkmig.job.settle import settle
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.job.switchover import Switchover
from qemu_blkmig.observe.progress import progress
from qemu_blkmig.places import STATE_VARIABLE
from qemu_blkmig.qmp.guest import UNDER_WAY, QemuGuest, migration_status, run_state
from qemu_blkmig.qmp.ram import RamMigration
from qemu_blkmig.qmp.socket import SocketMonitor
from tests.qmp.conftest import Qemu, StartQemu


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of the test's own."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    return tmp_path / "state"


async def migrate_away(qemu: Qemu) -> None:
    await qemu.user.execute("migrate", {"uri": "exec:cat >/dev/null"})
    while await migration_status(qemu.user) != "completed":  # noqa: ASYNC110
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(("migrating", "then"), [(False, "postmigrate"), (True, "running")], ids=["theirs", "ours"])
async def test_only_a_guest_that_we_migrated_is_resumed_after_it(
    start_qemu: StartQemu, migrating: bool, then: str
) -> None:
    qemu = await start_qemu()
    job = Job.create()
    job.record.source_qmp = qemu.second_socket
    job.record.run_state_taken, job.record.migrating = True, migrating
    await migrate_away(qemu)
    settlement = await settle(job, qemu.monitor)
    assert await run_state(qemu.user) == then
    assert any("start the guest twice" in fact for fact in settlement.facts) != migrating
    job.remove()


async def test_a_guest_that_was_migrated_away_is_not_resumed(start_qemu: StartQemu) -> None:
    qemu = await start_qemu()
    guest = QemuGuest(qemu.monitor)
    await guest.check_still_here()
    await migrate_away(qemu)
    with pytest.raises(GuestStateError, match="somebody else migrates"):
        await guest.resume()
    assert await run_state(qemu.user) == "postmigrate"


async def test_a_migration_that_is_not_ours_is_not_cancelled(start_qemu: StartQemu) -> None:
    qemu, destination = await start_qemu(), await start_qemu("-S", "-incoming", "defer")
    await qemu.user.execute("migrate-set-parameters", {"max-bandwidth": 1 << 16})
    await qemu.user.execute("migrate", {"uri": "exec:cat >/dev/null"})
    ram = RamMigration(qemu.monitor, destination.monitor)
    with pytest.raises(RequestError):
        await ram.start(downtime=0.3, bandwidth=None)
    await ram.cancel()
    assert await migration_status(qemu.user) in ("setup", "active")


@pytest.mark.parametrize("when", ["before the settings", "before the migration"])
async def test_a_migration_that_begins_just_before_ours_is_told_and_goes_on(
    start_qemu: StartQemu, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    qemu, destination = await start_qemu(), await start_qemu("-S", "-incoming", "defer")
    place = f"unix:{qemu.directory}/theirs"
    theirs = await start_qemu("-S", "-incoming", place)
    await qemu.user.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
    commands = {"before the settings": "migrate-set-capabilities", "before the migration": "migrate"}
    execute = qemu.monitor.execute

    async def overtaken(command: str, *arguments: Any, **more: Any) -> Any:
        if command == commands[when] and await migration_status(qemu.user) == "none":
            await qemu.user.execute("migrate", {"uri": place})
        return await execute(command, *arguments, **more)

    monkeypatch.setattr(qemu.monitor, "execute", overtaken)
    job = Job.create()
    job.record.source_qmp = qemu.second_socket
    job.record.was_running = job.record.run_state_taken = job.record.migrating = True
    over: Any = Switchover.__new__(Switchover)
    over._job, over._guest, over._steering = job, QemuGuest(qemu.monitor), Steering(0.3, None)
    over._last = SimpleNamespace(left_for_ram=lambda: 0.3)
    with pytest.raises(GuestStateError, match="somebody else migrates"):
        await over._start(RamMigration(qemu.monitor, destination.monitor))
    await settle(job, qemu.monitor)
    while (status := await migration_status(qemu.user)) in UNDER_WAY:
        assert status != "pre-switchover", "it would wait there for ever"
        await asyncio.sleep(0.05)
    assert status == "completed"
    assert await run_state(qemu.user) == "postmigrate"
    assert await migration_status(theirs.user) == "completed"
    job.remove()


async def test_a_copy_ends_when_the_guest_is_migrated_away_and_leaves_it_there(
    start_qemu: StartQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "TAKEN_OVER", 0.1)
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(8 << 20))
    qemu = await start_qemu(
        "-blockdev", f"driver=raw,node-name=n,file.driver=file,file.filename={image}",
        "-device", "virtio-blk-pci,drive=n",
    )  # fmt: skip
    await qemu.monitor.close()
    target = tmp_path / "target"
    target.mkdir()
    options = CopyOptions(
        Target(Local(str(target))), source=str(qemu.directory / "qmp.sock"), transfer=Transfer(bandwidth=4 << 20)
    )
    with progress("none") as reporter:
        copying = asyncio.create_task(_copied(options, reporter))
        while not list(target.iterdir()) or not await qemu.exports():
            if copying.done():
                await copying
                pytest.fail("the copy was over before the guest could be migrated away")
            await asyncio.sleep(0.02)
        await migrate_away(qemu)
        with pytest.raises(GuestStateError, match="somebody else migrates"):
            await copying
    assert await run_state(qemu.user) == "postmigrate"
    assert not list(target.iterdir())
    qemu.monitor = await SocketMonitor.connect(str(qemu.directory / "qmp.sock"), who="source QEMU")


async def _copied(options: CopyOptions, reporter: Any) -> None:
    await copy(options, reporter, Interrupts(reporter.note), RealClock())
