"""The guest's run state: asking for it, pausing and resuming (QEMU's run-state.json)."""

from __future__ import annotations

from qemu_blkmig.errors import GuestStateError
from qemu_blkmig.qmp.monitor import CommandFailed, Monitor

RUNNING = "running"
_CANNOT_RESUME = {
    "shutdown": "it has shut down",
    "guest-panicked": "it has crashed (guest-panicked)",
    "internal-error": "QEMU met an internal error",
    "inmigrate": "it waits for an incoming migration",
    "finish-migrate": "the last part of its migration is under way",
}

ASLEEP = "suspended"
"""The run state of a guest that sleeps (ACPI S3): no vCPU runs, but a timer or a device may wake it."""
ASLEEP_TEXT = "the guest sleeps (ACPI S3, run state suspended), and may wake at any moment"
ASLEEP_ADVICE = "wake it (QMP command system_wakeup), then try again"

MIGRATED = ("finish-migrate", "postmigrate")
"""Run states of a guest that a migration has paused."""
UNDER_WAY = ("setup", "cancelling", "active", "pre-switchover", "device", "wait-unplug")
"""What QEMU says of a migration that has not ended (query-migrate)."""


async def migration_status(monitor: Monitor, *, timeout: float = 30) -> str:  # noqa: ASYNC109
    """QEMU's word for where its migration stands ("none", "active", "completed", ...)."""
    return str((await monitor.execute("query-migrate", timeout=timeout)).get("status", "none"))


async def migration_away(monitor: Monitor) -> str:
    """QEMU's word for where a migration of its guest away stands.

    Of one by which the guest came here it says "completed" until another begins: that is "none" here.
    """
    status = await migration_status(monitor)
    return "none" if status == "completed" and await run_state(monitor) not in MIGRATED else status


async def run_state(monitor: Monitor) -> str:
    """Return the guest's run state by QEMU's name of it ("running", "paused", "io-error", "postmigrate", ...)."""
    return str((await monitor.execute("query-status"))["status"])


async def is_virtualized(monitor: Monitor) -> bool:
    """Whether the guest runs under KVM (query-kvm); if not, it is emulated, by TCG."""
    return bool((await monitor.execute("query-kvm"))["enabled"])


class QemuGuest:
    """The guest of one QEMU."""

    def __init__(self, monitor: Monitor) -> None:
        """Speak for the guest of the QEMU at `monitor`."""
        self._monitor = monitor

    async def is_paused(self) -> bool:
        """Whether no vCPU runs and the guest's requests are drained: so in every run state that is not running."""
        return not (await self._monitor.execute("query-status"))["running"]

    async def check_still_here(self) -> None:
        """Raise `GuestStateError` if somebody migrates the guest away, or did: it is not ours to pause and resume."""
        migration = await migration_away(self._monitor)
        if migration in UNDER_WAY or migration == "completed":
            state = await run_state(self._monitor)
            raise GuestStateError(f"somebody else migrates the guest away (migration {migration}, run state {state})")

    async def check_awake(self) -> None:
        """Raise `GuestStateError` if the guest sleeps (ACPI S3): it may wake by itself, in a pause of ours too.

        Whether a paused sleeper sleeps on or runs after `cont`, and whether it can be woken where it arrives, depends
        on the QEMU (9.0 remembers the sleep through a pause, older ones forget it).
        """
        if await run_state(self._monitor) == ASLEEP:
            raise GuestStateError(ASLEEP_TEXT, advice=ASLEEP_ADVICE)

    async def pause(self) -> None:
        """Stop the guest, drain its requests; no matter if it is stopped already. Raises `GuestStateError`."""
        try:
            await self._monitor.execute("stop")
        except CommandFailed as error:
            state = await run_state(self._monitor)
            raise GuestStateError(f"the guest ({state}) could not be paused: {error.description}") from error
        if not await self.is_paused():
            raise GuestStateError("the guest runs on although QEMU accepted the request to pause it")

    async def resume(self) -> None:
        """Let the guest run on. Raises `GuestStateError`, with what keeps it from that."""
        before = await run_state(self._monitor)
        if before in _CANNOT_RESUME:
            raise GuestStateError(f"the guest cannot be resumed: {_CANNOT_RESUME[before]}")
        await self.check_still_here()
        try:
            await self._monitor.execute("cont")
        except CommandFailed as error:
            raise GuestStateError(f"the guest ({before}) could not be resumed: {error.description}") from error
        now = await run_state(self._monitor)
        if now not in (RUNNING, ASLEEP):
            raise GuestStateError(f"the guest was resumed and is {now} again")
