"""Where a job runs, and what was asked for: what its journal notes of that in the beginning, in words for people.

Nothing of a command line is noted but single options: a QEMU's may hold secrets.
"""

from __future__ import annotations

import contextlib
import platform
import socket
from collections.abc import Iterator
from typing import Any

from qemu_blkmig import __version__
from qemu_blkmig.destination.protocol import HelloReply
from qemu_blkmig.errors import BlkmigError
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import CopyOptions, MigrateOptions
from qemu_blkmig.job.record import Record
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.units import show_bytes, show_rate, show_seconds


async def environment(source: Monitor | None, target: Monitor | None, there: HelloReply | None) -> dict[str, str]:
    """Hosts and versions, by what they are; what is not told is left out."""
    found = {"Source host": f"{socket.gethostname()}, {platform.system()} {platform.release()}"}
    if there is not None and there.host:
        found["Destination host"] = there.host
    if source is not None:
        found |= await _guest(source)
        found["Source QEMU"] = await _qemu(source)
    if target is not None:
        found["Destination QEMU"] = await _qemu(target)
    found["qemu-blkmig"] = __version__
    if there is not None and there.version and there.version != __version__:
        found["qemu-blkmig at the destination"] = there.version
    return {name: text for name, text in found.items() if text}


async def _guest(source: Monitor) -> dict[str, str]:
    name, accelerator = await _asked(source, "query-name"), await _asked(source, "query-kvm")
    found = {"Guest": name.get("name", "")}
    if "enabled" in accelerator:
        found["Accelerator"] = "KVM" if accelerator["enabled"] else "TCG (emulation)"
    return found


async def _qemu(monitor: Monitor) -> str:
    told = await _asked(monitor, "query-version")
    version = ".".join(str(told["qemu"][part]) for part in ("major", "minor", "micro")) if "qemu" in told else ""
    package = str(told.get("package", "")).strip(" ()")
    return f"{version} ({package})" if package else version


async def _asked(monitor: Monitor, command: str) -> dict[str, Any]:
    """The answer; nothing where there is none: no job is to fail for that."""
    with contextlib.suppress(BlkmigError):
        answer = await monitor.execute(command)
        if isinstance(answer, dict):
            return answer
    return {}


def libvirt_version(number: int) -> str:
    """`number` as libvirt tells its version."""
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def terms(record: Record) -> dict[str, str]:
    """What was asked for, by the name that it has for people."""
    return {} if record.options is None else dict(_terms(record.options))


def _terms(options: MigrateOptions | CopyOptions | ManagedOptions) -> Iterator[tuple[str, str]]:
    transfer, selection = options.transfer, options.selection
    yield "Downtime limit", show_seconds(options.downtime)
    yield "Bandwidth limit", "none" if transfer.bandwidth is None else show_rate(transfer.bandwidth)
    if transfer.group is not None:
        yield "Bandwidth group", f"{transfer.group[0]}, {show_rate(transfer.group[1])}"
    if transfer.adaptive:
        yield "Where the guest's disks become slow", "copied slower"
    yield "Rounds at most", "no bound" if options.max_rounds is None else str(options.max_rounds)
    if isinstance(options, MigrateOptions | ManagedOptions):
        yield "On a stall", options.on_stall.value
        yield "Switchover", str(options.switchover)
        yield "What is always written", "put off" if options.put_off else "copied in every round"
        yield "Source images afterwards", options.source_images.value
    yield "Verification", options.verify.value
    yield "Disks", "all" if selection.disks is None else ", ".join(selection.disks)
    if selection.shared_base:
        yield "Shared base", f"{selection.base or 'found by itself'}, compared: {selection.base_check.value}"
    if selection.compare:
        yield "Older copies at the destination", "compared, differences sent"
    if transfer.data is not None:
        yield "Data's own way", "TLS" if transfer.data.tls else "TCP, not encrypted"
    yield (
        "Connections a disk",
        f"{transfer.connections}, on each {transfer.requests} requests of {show_bytes(transfer.request_size)}",
    )
    yield "Writes are noted in", show_bytes(transfer.granularity)
