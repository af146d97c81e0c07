"""Pausing, resuming, and the migration of RAM between two QEMUs."""

from __future__ import annotations

import asyncio

import pytest

from qemu_blkmig.errors import ConnectionLost, DestinationFailed, GuestStateError, MigrationError
from qemu_blkmig.qmp.guest import QemuGuest, run_state
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.qmp.ram import RamMigration
from tests.qmp.conftest import Qemu, StartQemu


async def test_pause_and_resume(start_qemu: StartQemu) -> None:
    qemu = await start_qemu()
    guest = QemuGuest(qemu.monitor)
    assert not await guest.is_paused()
    await guest.pause()
    await guest.pause()
    assert await guest.is_paused()
    await guest.resume()
    assert await run_state(qemu.monitor) == "running"


async def test_a_guest_that_was_never_started_is_paused(start_qemu: StartQemu) -> None:
    qemu = await start_qemu(paused=True)
    assert await QemuGuest(qemu.monitor).is_paused()


async def test_a_guest_that_waits_for_a_migration_cannot_be_resumed(start_qemu: StartQemu) -> None:
    qemu = await start_qemu("-incoming", "defer")
    with pytest.raises(GuestStateError, match="it waits for an incoming migration"):
        await QemuGuest(qemu.monitor).resume()


class SleepingGuest:
    """A monitor of a QEMU whose guest is in S3; `cont` leaves it there (QEMU 9.0)."""

    async def execute(self, command: str, _arguments: object = None, **_: object) -> object:
        return {"query-status": {"status": "suspended", "running": False}, "query-migrate": {}, "cont": {}}[command]


async def test_a_guest_that_sleeps_is_refused_before_a_pause_and_goes_on_sleeping_after_one() -> None:
    guest = QemuGuest(SleepingGuest())  # type: ignore[arg-type]
    with pytest.raises(GuestStateError, match="sleeps"):
        await guest.check_awake()
    await guest.resume()


async def pair(start_qemu: StartQemu, paused: bool) -> tuple[Qemu, Qemu, RamMigration]:
    source = await start_qemu(paused=paused)
    destination = await start_qemu("-S", "-incoming", "defer")
    return source, destination, RamMigration(source.monitor, destination.monitor)


async def settings(qemu: Qemu) -> tuple[object, object, object]:
    parameters = await qemu.user.execute("query-migrate-parameters")
    capabilities = await qemu.user.execute("query-migrate-capabilities")
    return parameters["downtime-limit"], parameters["max-bandwidth"], capabilities


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
async def test_the_guest_waits_before_the_switchover_and_arrives(start_qemu: StartQemu, paused: bool) -> None:
    source, destination, ram = await pair(start_qemu, paused)
    before = await settings(source)
    await ram.start(downtime=0.3, bandwidth=1 << 30)
    await ram.wait_paused()
    assert await run_state(source.monitor) == "finish-migrate"
    assert (ram.paused_at is None) == paused
    await ram.proceed()
    await ram.wait_completed()
    assert await settings(source) == before
    await QemuGuest(destination.monitor).resume()
    assert await QemuGuest(source.monitor).is_paused()


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
async def test_a_cancelled_migration_gives_the_guest_back_as_it_was(start_qemu: StartQemu, paused: bool) -> None:
    source, _destination, ram = await pair(start_qemu, paused)
    before = await settings(source)
    await ram.start(downtime=0.3, bandwidth=None)
    await ram.wait_paused()
    await ram.cancel()
    await ram.cancel()
    assert await ram.status() == "cancelled"
    assert await QemuGuest(source.monitor).is_paused() == paused
    assert await settings(source) == before
    with pytest.raises(MigrationError):
        await ram.wait_paused()


async def test_a_destination_killed_while_it_waits_is_told(start_qemu: StartQemu) -> None:
    source, destination, ram = await pair(start_qemu, False)
    await ram.start(downtime=0.3, bandwidth=None)
    await ram.wait_paused()
    destination.process.kill()
    await destination.monitor.wait_lost()
    await ram.proceed()
    with pytest.raises(DestinationFailed, match="destination QEMU is gone"):
        await ram.wait_completed()
    await ram.cancel()
    await QemuGuest(source.monitor).resume()


class Astray:
    """A way for RAM that does not lead to the destination, as where a firewall is between."""

    async def open(self, _source: Monitor, destination: Monitor) -> str:
        await destination.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        return "tcp:127.0.0.1:1"


async def test_a_way_for_ram_that_leads_nowhere_is_told(start_qemu: StartQemu) -> None:
    source, destination, _ram = await pair(start_qemu, False)
    ram = RamMigration(source.monitor, destination.monitor, channel=Astray())
    await ram.start(downtime=0.3, bandwidth=None)
    await ram.wait_set_up()
    with pytest.raises(MigrationError, match="Connection refused"):
        await asyncio.wait_for(ram.wait_paused(), 30)
    await ram.cancel()
    assert not await QemuGuest(source.monitor).is_paused()


async def test_a_source_that_is_killed_is_told(start_qemu: StartQemu) -> None:
    source, _destination, ram = await pair(start_qemu, False)
    await ram.start(downtime=0.3, bandwidth=None)
    source.process.kill()
    with pytest.raises(ConnectionLost, match="source QEMU is gone"):
        await ram.wait_paused()
        await ram.proceed()


async def test_a_limit_can_be_changed_under_way(start_qemu: StartQemu) -> None:
    source, _destination, ram = await pair(start_qemu, False)
    await ram.start(downtime=0.3, bandwidth=None)
    await ram.adjust(downtime=1.5, bandwidth=1 << 20)
    assert (await settings(source))[0] == 1500
    await ram.cancel()


async def test_a_cancellation_just_before_the_pause_hangs_no_guest(start_qemu: StartQemu) -> None:
    source = await start_qemu()
    for milliseconds in (1, 1.5, 1.5, 2, 2, 2, 2.5, 3):
        destination = await start_qemu("-S", "-incoming", "defer")
        ram = RamMigration(source.monitor, destination.monitor)
        await ram.start(downtime=0.3, bandwidth=None)
        await asyncio.sleep(milliseconds / 1000)
        await ram.cancel()
        assert await run_state(source.monitor) == "running"
