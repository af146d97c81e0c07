"""The commands of the old wire format: their options, the function each calls, how its result is shown."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from qemu_blkmig.cli import options, show, show_stream
from qemu_blkmig.cli.clock import RealClock
from qemu_blkmig.cli.form import as_json
from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.options import SaveOptions, Selection, Transfer
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.observe.progress import progress
from qemu_blkmig.observe.watch import watching
from qemu_blkmig.stream.channel import FORMS, SOCKETS, check, open_source
from qemu_blkmig.stream.events import CHUNK, Block
from qemu_blkmig.stream.framing import PAGE_SIZE, Decoder
from qemu_blkmig.stream.survey import BUFFER, survey
from qemu_blkmig.units import parse_rate, parse_size

Commands = Any  # argparse keeps the type of its sub-parsers' collection private


def add_all(commands: Commands) -> None:
    """Add the commands to the parser."""
    _add_save(commands)
    _add_load(commands)
    _add_inspect(commands)


def _add_save(commands: Commands) -> None:
    usual = SaveOptions.transfer
    parser = commands.add_parser("save", help="write a guest's disks, or an image file, as a stream; the guest stays")
    parser.add_argument("source", metavar="SOURCE", help="qmp:/path/to.sock or image:/path")
    parser.add_argument("--to", required=True, metavar="URI", help=FORMS)
    parser.add_argument("--name", action="append", default=[], metavar="DISK=ID",
                        help="what the disk is called in the stream (default: its drive id)")  # fmt: skip
    parser.add_argument("--migrate-disks", metavar="LIST", help="only these disks, by drive id, device id or node name")
    parser.add_argument("--shared-base", action="store_true", help="only what overlays hold above their backing files")
    parser.add_argument("--allow-plaintext", action="store_true", help="an encrypted disk may be written in plain text")
    parser.add_argument(
        "--ignore-ownership", action="store_true", help="also from an image that a record calls incomplete or moved"
    )
    options.add_source_format(parser)
    parser.add_argument(
        "--agent", metavar="SOCK", help="the guest agent's unix socket: file systems are frozen at the end"
    )
    group = parser.add_argument_group("the receiver")
    group.add_argument("--for-qemu", action=argparse.BooleanOptionalAction, default=None,
                       help="a real QEMU receives (default: on unix: and tcp:)")  # fmt: skip
    group.add_argument("--machine", metavar="NAME", help="machine type to be named (default: the source's)")
    group.add_argument("--no-configuration", action="store_true", help="name none (machine types before 2.4)")
    group.add_argument("--no-footers", action="store_true", help="no section footers (machine types before 2.4)")
    group.add_argument("--no-zero-blocks", action="store_true", help="send zeroes as data (QEMU before 1.6)")
    group = parser.add_argument_group("tuning (sizes take k, M, G, T)")
    group.add_argument("--bandwidth", type=parse_rate, metavar="RATE", help="MiB/s, or bytes a second with a suffix")
    group.add_argument("--connections", type=int, default=usual.connections, metavar="N")
    group.add_argument("--requests", type=int, default=usual.requests, metavar="N", help="in flight on a connection")
    group.add_argument("--request-size", type=parse_size, default=usual.request_size, metavar="SIZE")
    group.add_argument(
        "--downtime", type=int, default=300, metavar="MS", help="longest pause of the guest (default 300)"
    )
    group.add_argument("--max-rounds", type=int, default=30, metavar="N", help="dirty rounds before it is a stall")
    group.add_argument("--freeze-limit", type=float, default=10.0, metavar="SECONDS",
                       help="longest time that the guest may be frozen or paused (default 10)")  # fmt: skip
    parser.add_argument("--progress", choices=["auto", "bar", "json", "none"], default="auto")
    parser.add_argument("--output", choices=["text", "json"], default="text")
    options.add_metrics(parser)
    parser.set_defaults(run=_save, command="save")


def _save(arguments: argparse.Namespace) -> int:
    from qemu_blkmig.job.save import save

    kind, _, place = arguments.source.partition(":")
    if kind not in ("qmp", "image") or not place:
        raise UsageError(f"not a source: {arguments.source!r}", advice="write qmp:/path/to.sock or image:/path")
    wanted = SaveOptions(
        to=arguments.to,
        source=place if kind == "qmp" else None,
        image=place if kind == "image" else None,
        image_format=arguments.source_format,
        agent=arguments.agent,
        selection=Selection(
            disks=options.disk_names(arguments.migrate_disks),
            shared_base=arguments.shared_base,
            allow_plaintext=arguments.allow_plaintext,
            ignore_ownership=arguments.ignore_ownership,
            drop_snapshots=True,
        ),
        transfer=Transfer(
            granularity=CHUNK,
            connections=arguments.connections,
            requests=arguments.requests,
            request_size=arguments.request_size,
            bandwidth=arguments.bandwidth,
        ),
        downtime=arguments.downtime / 1000,
        max_rounds=arguments.max_rounds,
        freeze_limit=arguments.freeze_limit,
        for_qemu=check(arguments.to)[0] in SOCKETS if arguments.for_qemu is None else arguments.for_qemu,
        machine=arguments.machine,
        configuration=not arguments.no_configuration,
        footers=not arguments.no_footers,
        zero_blocks=not arguments.no_zero_blocks,
        names=dict(_assignments(arguments.name)),
    )
    with watching(options.asked(arguments, arguments.source, arguments.to)) as watch:
        result = asyncio.run(save(wanted, watch.reporter, Interrupts(watch.reporter.note), RealClock()))
        watch.done(result)
    print(as_json(result) if arguments.output == "json" else show.result(result))
    return 0


def _add_load(commands: Commands) -> None:
    parser = commands.add_parser("load", help="bring a QEMU's `migrate blk=true` stream, or a saved one, into images")
    parser.add_argument("--from", dest="source", required=True, metavar="URI", help=FORMS)
    parser.add_argument("images", nargs="*", metavar="NAME=IMAGE", help="which device (drive id) goes into which image")
    parser.add_argument("--create", action="store_true", help="make the images; without it they must be there")
    parser.add_argument("--format", metavar="FMT", help="of the images (created: raw; there: as recognized)")
    parser.add_argument("--size", action="append", default=[], metavar="[NAME=]SIZE",
                        help="of created images (default: by the stream's highest block)")  # fmt: skip
    parser.add_argument("--expect-size", action="append", default=[], metavar="[NAME=]SIZE",
                        help="fail unless the stream reaches to just the end of a disk of this size")  # fmt: skip
    parser.add_argument("--incremental", action="store_true", help="the stream is meant to hold only a part")
    parser.add_argument("--require-complete", action="store_true", help="fail unless every chunk of each disk came")
    parser.add_argument(
        "--forward", metavar="URI", help="pass RAM and devices on to a new QEMU's -incoming, once the images are closed"
    )
    parser.add_argument("--list", action="store_true", help="print the stream's blocks, a line each, write nothing")
    _add_page_size(parser)
    parser.add_argument("--progress", choices=["auto", "bar", "json", "none"], default="auto")
    parser.add_argument("--output", choices=["text", "json"], default="text")
    parser.set_defaults(run=_load)


def _load(arguments: argparse.Namespace) -> int:
    from qemu_blkmig.job.load import load
    from qemu_blkmig.job.load_options import LoadOptions

    if arguments.list:
        return _list(arguments.source, arguments.page_size, as_json=arguments.output == "json")
    if not arguments.images:
        raise UsageError("no image is named", advice="write NAME=IMAGE; --list shows the names in a stream")
    wanted = LoadOptions(
        source=arguments.source,
        images=dict(_assignments(arguments.images)),
        create=arguments.create,
        format=arguments.format,
        sizes=dict(_sizes(arguments.size)),
        expected=dict(_sizes(arguments.expect_size)),
        incremental=arguments.incremental,
        require_complete=arguments.require_complete,
        forward=arguments.forward,
        page_size=arguments.page_size,
    )
    with progress(arguments.progress) as reporter:
        result = asyncio.run(load(wanted, reporter, Interrupts(reporter.note)))
    print(as_json(result) if arguments.output == "json" else show_stream.loaded(result))
    return 0


def _list(source: str, page_size: int, *, as_json: bool) -> int:
    control = Control()
    channel = open_source(source, control, lambda text: print(text, file=sys.stderr))
    try:
        decoder = Decoder(page_size=page_size)
        buffer = memoryview(bytearray(BUFFER))
        while count := channel.read(buffer, control):
            for event in decoder.feed(buffer[:count]):
                if isinstance(event, Block):
                    print(msgspec.json.encode(event).decode() if as_json else show_stream.block(event))
        list(decoder.close())
    finally:
        channel.abandon()
        control.close()
    return 0


def _add_inspect(commands: Commands) -> None:
    parser = commands.add_parser("inspect", help="tell what a migration stream holds")
    parser.add_argument("stream", metavar="STREAM", help=f"a file, - for stdin, or {FORMS}")
    parser.add_argument("--map", action=argparse.BooleanOptionalAction, default=None,
                        help="a map of each disk (default: on a terminal)")  # fmt: skip
    _add_page_size(parser)
    parser.add_argument("--output", choices=["text", "json"], default="text")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    control = Control()
    channel = open_source(_place(arguments.stream), control, lambda text: print(text, file=sys.stderr))
    try:
        gathered, found = survey(channel, control, page_size=arguments.page_size)
    finally:
        channel.abandon()
        control.close()
    wants_map = sys.stdout.isatty() if arguments.map is None else arguments.map
    maps = gathered.maps if wants_map else None
    print(as_json(found) if arguments.output == "json" else show_stream.inspection(found, maps))
    return 1 if found.flaw else 0


def _add_page_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--page-size", type=_page_size, default=PAGE_SIZE, metavar="SIZE",
                        help="of the guest's architecture, where the stream does not tell (default 4k)")  # fmt: skip


def _page_size(text: str) -> int:
    size = parse_size(text)
    if not 1024 <= size <= 1 << 30 or size & (size - 1):
        raise UsageError("--page-size must be a power of two from 1k to 1G")
    return size


def _place(text: str) -> str:
    if text == "-":
        return "fd:0"
    return text if text.partition(":")[0] in ("file", "fd", "exec", "unix", "tcp") else f"file:{text}"


def _assignments(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise UsageError(f"{text!r} is not NAME=IMAGE")
        if name in seen:
            raise UsageError(f"device {name!r} is given two images")
        seen.add(name)
        yield name, path


def _sizes(texts: Sequence[str]) -> Iterator[tuple[str | None, int]]:
    for text in texts:
        name, equals, size = text.rpartition("=")
        yield name if equals else None, parse_size(size)
