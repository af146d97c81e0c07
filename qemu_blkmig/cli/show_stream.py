"""Streams, and what was loaded of them, as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qemu_blkmig.units import show_bytes

if TYPE_CHECKING:
    from qemu_blkmig.job.load_result import LoadResult
    from qemu_blkmig.stream.chunkmap import ChunkMaps
    from qemu_blkmig.stream.events import Block
    from qemu_blkmig.stream.survey import Inspection

MAP_WIDTH = 64
MAP_CELLS = 16 * MAP_WIDTH


def printable(text: str) -> str:
    """What a stream says, with whatever could steer a terminal escaped."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def block(record: Block) -> str:
    """One line of `load --list`."""
    return f"{printable(record.device)}\t{record.position}\t{'zero' if record.zero else 'data'}"


def inspection(found: Inspection, maps: ChunkMaps | None) -> str:
    """What `inspect` found; with `maps`, a map of each disk."""
    machine = printable(found.machine) if found.machine else "not told (no configuration section)"
    footers = {True: "with footers", False: "without footers", None: "no sections"}[found.footers]
    lines = [f"{show_bytes(found.bytes)}, machine {machine}, {footers}"]
    if found.capabilities:
        lines.append(f"capabilities: {', '.join(map(printable, found.capabilities))}")
    if found.uuid:
        lines.append(f"uuid: {found.uuid}")
    parts = ", ".join(f"{name} in {count} parts" for name, count in found.parts.items())
    lines.append(f"sections: {parts or 'none'}")
    for device in found.devices:
        lines.append(
            f"device {device.name!r}: {device.blocks} blocks ({device.zero_blocks} zero), {show_bytes(device.bytes)} "
            f"of data, {device.chunks} different chunks, {device.repeated} repeated, ends at {device.end}"
        )
        if maps is not None:
            picture = maps.devices[device.name].picture(MAP_CELLS)
            lines += [f"    {picture[at : at + MAP_WIDTH]}" for at in range(0, len(picture), MAP_WIDTH)]
    if maps is not None and found.devices:
        lines.append("    # data  0 zero  + some of each  . nothing")
    for number, each in enumerate(found.iterations, 1):
        percent = "" if each.percent is None else f", {each.percent} %"
        lines.append(
            f"iteration {number} ({each.part} at {each.offset}): {each.blocks} blocks, {each.zero_blocks} zero{percent}"
        )
    if found.more_iterations:
        lines.append(f"and {found.more_iterations} more")
    lines.append(f"{found.empty_iterations} iterations without a block")
    if found.ram is not None:
        lines.append(
            f"RAM: {show_bytes(found.ram.size)}; pages: {found.ram.plain_pages} plain, "
            f"{found.ram.filled_pages} filled, {found.ram.compressed_pages} compressed"
        )
    if found.device_state_at is not None:
        lines.append(f"device state from byte {found.device_state_at} on")
    lines.append(f"flaw: {found.flaw}" if found.flaw else f"ends with: {found.end}")
    return "\n".join(lines)


def loaded(outcome: LoadResult) -> str:
    """What `load` did."""
    lines = [outcome.outcome + (f", from machine {printable(outcome.machine)}" if outcome.machine else "")]
    for disk in outcome.disks:
        lines.append(f"  disk {disk.name}: {disk.image} ({disk.format}, {show_bytes(disk.virtual_size)} virtual)")
        lines.append(
            f"    {disk.blocks} blocks ({disk.zero_blocks} zero); written {show_bytes(disk.written)}, zeroed "
            f"{show_bytes(disk.zeroed)}, never came {show_bytes(disk.missing)}"
        )
    lines += [f"  proven: {fact}" for fact in outcome.proven]
    lines += [f"  note: {warning}" for warning in outcome.warnings]
    return "\n".join(lines)
