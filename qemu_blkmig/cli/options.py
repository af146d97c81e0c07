"""What commands have in common: groups of options, what is made of them, how a result is printed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import msgspec

from qemu_blkmig.cli.form import argument, as_json
from qemu_blkmig.errors import BlkmigError, UsageError
from qemu_blkmig.hashing import SIZES, USUAL
from qemu_blkmig.job.datapath import parse_data_path
from qemu_blkmig.job.moment import Moment, parse_moment
from qemu_blkmig.job.options import Afterwards, BaseCheck, OnStall, Selection, Target, Transfer, Verify
from qemu_blkmig.job.place import FORMS, REMOTE_COMMAND, Place, parse_place
from qemu_blkmig.observe.asked import Asked, parse_listen
from qemu_blkmig.observe.events import utf8
from qemu_blkmig.units import parse_rate, parse_size

_T = TypeVar("_T")


class Common(TypedDict):
    """What `migrate` and `copy` take alike, as `MigrateOptions` and `CopyOptions` have it."""

    selection: Selection
    transfer: Transfer
    downtime: float
    max_rounds: int | None
    verify: Verify


def common(arguments: argparse.Namespace) -> Common:
    """What was given of it. Raises `UsageError`."""
    return Common(
        selection=selection(arguments),
        transfer=transfer(arguments),
        downtime=arguments.downtime / 1000,
        max_rounds=arguments.max_rounds,
        verify=Verify(arguments.verify),
    )


def add_ends(parser: argparse.ArgumentParser, *, domains: bool) -> None:
    """SOURCE and DEST; the source may also be a domain of libvirt's (`domains`), or an image file."""
    other = (
        "libvirt:DOMAIN, a domain of this host's, whose DEST is on another one"
        if domains
        else "image:/path of an image file that no guest uses"
    )
    parser.add_argument(
        "source", metavar="SOURCE", help=f"qmp:/path/to.sock, the running guest's QMP socket; or {other}"
    )
    parser.add_argument(
        "destination",
        metavar="DEST",
        help=f"directory for the images, {FORMS}; they get the names, formats and sizes of the source's. "
        "One that is there must have the same size; it is overwritten (--compare: just where it differs)",
    )
    parser.add_argument(
        "--remote-command",
        metavar="CMD",
        default=REMOTE_COMMAND,
        help=f"how qemu-blkmig is called on the host of an ssh:// destination (default: {REMOTE_COMMAND})",
    )


def add_source_format(parser: argparse.ArgumentParser) -> None:
    """Add `--source-format`, of a source that may be an image file."""
    parser.add_argument(
        "--source-format",
        metavar="FMT",
        help="format of an image: source (default: as recognized; to be told where it names another file)",
    )


def add_target(parser: argparse.ArgumentParser) -> Any:
    """Which QEMU the guest moves to; returns the group."""
    group = parser.add_argument_group("destination QEMU (one of)")
    group.add_argument(
        "--launch",
        metavar="CMD",
        help="start it by this shell command, run in DEST, with the same devices as the source's and the images in "
        "DEST; we append -S -incoming defer -qmp ...",
    )
    group.add_argument(
        "--target-qmp", metavar="SOCK", help="the QMP socket there of one that waits already, with -incoming defer"
    )
    parser.add_argument(
        "--ram-uri",
        metavar="URI",
        help="RAM goes from QEMU to QEMU by this, such as tcp:hostb:4444, not through ssh: only on a network that you "
        "trust, it is neither encrypted nor authenticated (default: the same way as everything else)",
    )
    return group


def add_selection(parser: argparse.ArgumentParser, *shared_base: str) -> None:
    """Which disks; `shared_base`: what that option is called, where not only by its usual name."""
    group = parser.add_argument_group("which disks, and what the destination has already")
    group.add_argument(
        "--migrate-disks",
        metavar="LIST",
        help="only these disks, by drive id, device id or node name (a libvirt domain's by target), such as vda,vdb "
        "(default: all writable ones)",
    )
    group.add_argument(
        *(shared_base or ["--shared-base"]),
        action="store_true",
        help="the destination has the backing files: send the overlays only",
    )
    group.add_argument(
        "--base",
        metavar="PATH",
        help="with --shared-base: the file of the source's chain that is shared (default: the topmost backing file "
        "that the destination has)",
    )
    group.add_argument(
        "--base-check",
        choices=[choice.value for choice in BaseCheck],
        default=BaseCheck.FULL.value,
        help="with --shared-base: hash both sides' bases, and refuse if they differ (full, the default; known ones are "
        "not read again); compare only their sizes (size), or nothing (none): neither proves that they are equal",
    )
    group.add_argument(
        "--flatten",
        choices=["yes", "no"],
        default="yes",
        help="with --shared-base: several layers above the base become one overlay (yes, the default), or are copied "
        "one by one, each a job of its own, before the guest's disk (no)",
    )
    group.add_argument(
        "--target-is-zero", action="store_true", help="existing destination images read as zeroes: do not write any"
    )
    group.add_argument("--hash", choices=list(SIZES), default=USUAL,
                       help="what contents are compared by; the others withstand forgery, and cost ten times as much "
                       f"(default: {USUAL})")  # fmt: skip
    group.add_argument(
        "--compare",
        action="store_true",
        help="existing destination images are older copies: hash both sides, and send just what differs",
    )
    group.add_argument("--allow-plaintext", action="store_true", help="an encrypted disk may be written in plain text")
    group.add_argument(
        "--bitmaps",
        choices=["keep", "drop"],
        default="keep",
        help="dirty bitmaps of others (backup tools') on qcow2 disks: take them along where QEMU can, which the "
        "warnings tell (keep, the default), or leave them (drop)",
    )
    group.add_argument(
        "--preallocation",
        choices=["off", "metadata", "falloc", "full"],
        default="off",
        help="of images that are created, as `qemu-img create` has it (default: off, sparse stays sparse)",
    )
    group.add_argument(
        "--drop-snapshots",
        action="store_true",
        help="a qcow2 image's internal snapshots may stay behind: only what the guest sees now is sent",
    )
    group.add_argument(
        "--ignore-ownership",
        action="store_true",
        help="migrate from an image although a record beside it says that it is incomplete, or was moved away",
    )


def add_transfer(parser: argparse.ArgumentParser) -> None:
    """How bytes are carried."""
    usual = Transfer()
    group = parser.add_argument_group("tuning (sizes take k, M, G, T: powers of 1024)")
    group.add_argument(
        "--bandwidth",
        type=argument(parse_rate),
        metavar="RATE",
        help="most MiB/s, such as 100; or bytes a second with a suffix, such as 512k (default: no limit)",
    )
    group.add_argument(
        "--adaptive",
        action="store_true",
        help="begin slowly, and copy only as fast as leaves the guest's disks about as quick as they were; --bandwidth "
        "stays the most. In force for the first pass over the disks",
    )
    group.add_argument(
        "--bandwidth-group",
        type=argument(bandwidth_group),
        metavar="NAME=RATE",
        help="share RATE with all jobs here that name the same group: evenly, but what one leaves goes to the others",
    )
    group.add_argument("--slots", type=argument(count), metavar="N",
                       help="wait until less than N jobs here are in their first pass")  # fmt: skip
    group.add_argument("--connections", type=argument(count), default=usual.connections, metavar="N",
                       help=f"NBD connections for each disk, 1 to 64 (default: {usual.connections})")  # fmt: skip
    group.add_argument("--requests", type=argument(count), default=usual.requests, metavar="N",
                       help="requests in flight on a connection, 1 to 64; more on a long way "
                       f"(default: {usual.requests})")  # fmt: skip
    group.add_argument("--request-size", type=argument(parse_size), default=usual.request_size, metavar="SIZE",
                       help="largest request, 64k to 32M (default: 1M)")  # fmt: skip
    group.add_argument("--chunk-size", type=argument(parse_size), default=usual.chunk_size, metavar="SIZE",
                       help="unit of the first pass, 64k to 32M (default: 1M)")  # fmt: skip
    group.add_argument("--granularity", type=argument(parse_size), default=usual.granularity, metavar="SIZE",
                       help="unit in which QEMU notes what the guest writes, 512 to 2G (default: 64k)")  # fmt: skip


def add_data_path(parser: argparse.ArgumentParser) -> None:
    """The data's own way."""
    group = parser.add_argument_group("the data's own way, past ssh")
    group.add_argument(
        "--data",
        metavar="ADDRESS",
        help="tls://[HOST[:PORT]]: the destination reads the disks over TCP with TLS, from this host's address HOST "
        "(default: the one that leads there) and PORT (default: any that is free; a firewall must let it in)",
    )
    group.add_argument(
        "--tls-creds",
        metavar="DIR",
        help="certificates in DIR on both hosts, as QEMU's manual names them (default: a key made for this job and "
        "passed through ssh)",
    )
    group.add_argument("--insecure", action="store_true", help="permit --data tcp://..., which is not encrypted")


def add_convergence(parser: argparse.ArgumentParser) -> Any:
    """How long the guest may stand still; returns the group."""
    group = parser.add_argument_group("the guest's pause")
    group.add_argument("--downtime", type=argument(count), default=300, metavar="MS",
                       help="longest pause of the guest to aim at, in milliseconds (default: 300)")  # fmt: skip
    group.add_argument("--max-rounds", type=argument(count), default=30, metavar="N",
                       help="how often what the guest has written meanwhile is copied, before it is a stall "
                       "(default: 30)")  # fmt: skip
    group.add_argument("--verify", choices=[choice.value for choice in Verify], default=Verify.WRITTEN.value,
                       help="written (the default): the destination reads back what it wrote, mostly before the "
                       "pause, and compares it with hashes of what was read at the source. full: hash both sides "
                       "completely while the guest is paused: that also proves that nothing was missed, but it is as "
                       "long as reading them takes. none: neither")  # fmt: skip
    return group


def add_switchover(convergence: Any) -> None:
    """When the guest moves, and what if its pause does not come to be short enough; `convergence`: the group."""
    convergence.add_argument(
        "--on-stall",
        choices=[choice.value for choice in OnStall],
        default="abort",
        help="if after --max-rounds the pause would still be longer than --downtime: give up, the guest stays (abort, "
        "the default); pause it for as long as it takes (pause); go on trying (wait); slow its disk writes as far as "
        "it takes, until it moves (throttle; reads are not slowed, and limits of its own come back)",
    )
    convergence.add_argument(
        "--put-off",
        choices=["yes", "no"],
        default="yes",
        help="what the guest writes all the time is copied last, as far as that fits the pause (yes, the default), or "
        "again in every round (no)",
    )
    convergence.add_argument(
        "--switchover",
        type=argument(parse_moment),
        default=Moment(),
        metavar="WHEN",
        help="when the guest moves: as soon as the pause fits --downtime (auto, the default); when told by "
        "`qemu-blkmig switchover JOB` (manual), its disks being kept in step until then, for days if need be; or "
        "at=TIME, such as at=02:30 or at=2030-01-31T02:30+01:00",
    )


def add_source_images(parser: argparse.ArgumentParser) -> None:
    """What becomes of the source's images."""
    parser.add_argument(
        "--source-images",
        choices=[choice.value for choice in Afterwards],
        default="keep",
        help="what becomes of the source's images once its QEMU has quit: keep (the default), rename to "
        "NAME.moved-JOB, or delete; backing files always stay",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """How progress and result are told."""
    parser.add_argument("--progress", choices=["auto", "bar", "json", "none"], default="auto",
                        help="on stderr: figures drawn in place (bar), one JSON object a line, or nothing "
                        "(default: auto, figures on a terminal, else a line for each phase)")  # fmt: skip
    add_form(parser)


def add_metrics(parser: argparse.ArgumentParser) -> None:
    """Where metrics go."""
    group = parser.add_argument_group("metrics, for Prometheus")
    group.add_argument("--metrics-file", type=Path, metavar="FILE",
                       help="keep them in FILE, renewed every 5 s, for node_exporter's textfile collector (which wants "
                       "it to end in .prom); it stays, and tells of the last job")  # fmt: skip
    group.add_argument("--metrics-listen", metavar="[HOST:]PORT",
                       help="answer Prometheus at http://HOST:PORT/metrics as long as the job lasts; whoever reaches "
                       "it can read them (default HOST: 127.0.0.1; PORT 0: any free one, which is told)")  # fmt: skip


def asked(arguments: argparse.Namespace, source: str, destination: str) -> Asked:
    """What is to watch a job from `source` to `destination`. Raises `UsageError`."""
    listen = None
    if arguments.metrics_listen is not None:
        listen = parse_listen(arguments.metrics_listen)
    ends = utf8(source), utf8(destination)
    return Asked(arguments.progress, arguments.command, *ends, arguments.metrics_file, listen)


def add_form(parser: argparse.ArgumentParser) -> None:
    """How the result is told."""
    parser.add_argument("--output", choices=["text", "json"], default="text",
                        help="the result on stdout, as text (default) or one JSON object; with json an error is one, "
                        'too: {"error": {"exit_code", "kind", "what", "disk", "state", "advice", '
                        '"suspended"}}')  # fmt: skip


def count(text: str) -> int:
    """A whole number. Raises `UsageError`."""
    if not text.strip().lstrip("-").isdecimal():
        raise UsageError(f"not a whole number: {text!r}", advice="write digits only, such as 300")
    return int(text)


def rate_or_none(text: str) -> int:
    """Bytes a second; 0 for none. Raises `UsageError`."""
    if text.strip().lower() == "none":
        return 0
    return parse_rate(text) or -1


def bandwidth_group(text: str) -> tuple[str, int]:
    """NAME=RATE. Raises `UsageError`."""
    name, equals, rate = text.partition("=")
    if not equals:
        raise UsageError(f"not a group: {text!r}", advice="write NAME=RATE, such as backup=100")
    return name, parse_rate(rate)


def source(text: str) -> tuple[str, str]:
    """`qmp` or `image`, and the path. Raises `UsageError`."""
    kind, _, path = text.partition(":")
    if kind not in ("qmp", "image") or not path:
        raise UsageError(
            f"not a source: {text!r}", advice="write qmp:/path/to.sock (copy: or image:/path); there are no others yet"
        )
    return kind, path


def guest(text: str) -> str:
    """The QMP socket of a source that is a guest. Raises `UsageError`."""
    kind, path = source(text)
    if kind != "qmp":
        raise UsageError(f"{text!r} is no running guest", advice="write qmp:/path/to.sock; `copy` takes image:/path")
    return path


def place(arguments: argparse.Namespace) -> Place:
    """Where the images go. Raises `UsageError`."""
    return parse_place(arguments.destination, arguments.remote_command)


def target(arguments: argparse.Namespace) -> Target:
    """Which QEMU the guest moves to, and where the images go. Raises `UsageError`."""
    return Target(place(arguments), arguments.target_qmp, arguments.launch, arguments.ram_uri)


def disk_names(listed: str | None) -> tuple[str, ...] | None:
    """The names of disks that a list of --migrate-disks has; None where it is not given. Raises `UsageError`."""
    if listed is None:
        return None
    names = tuple(name.strip() for name in listed.split(","))
    if not all(names):
        raise UsageError(f"--migrate-disks {listed!r}: a name is empty", advice="write names, such as vda,vdb")
    return names


def selection(arguments: argparse.Namespace) -> Selection:
    """Which disks."""
    return Selection(
        disks=disk_names(arguments.migrate_disks),
        shared_base=arguments.shared_base,
        target_is_zero=arguments.target_is_zero,
        allow_plaintext=arguments.allow_plaintext,
        ignore_ownership=arguments.ignore_ownership,
        drop_snapshots=arguments.drop_snapshots,
        preallocation=arguments.preallocation,
        compare=arguments.compare,
        keep_bitmaps=arguments.bitmaps == "keep",
        base=arguments.base,
        base_check=BaseCheck(arguments.base_check),
        base_hash=arguments.hash,
        flatten=arguments.flatten == "yes",
    )


def transfer(arguments: argparse.Namespace) -> Transfer:
    """How bytes are carried. Raises `UsageError`."""
    return Transfer(
        chunk_size=arguments.chunk_size,
        granularity=arguments.granularity,
        connections=arguments.connections,
        requests=arguments.requests,
        request_size=arguments.request_size,
        bandwidth=arguments.bandwidth,
        group=arguments.bandwidth_group,
        slots=arguments.slots,
        adaptive=arguments.adaptive,
        hash=arguments.hash,
        data=parse_data_path(arguments.data, certificates=arguments.tls_creds, insecure=arguments.insecure),
    )


def print_outcome(outcome: msgspec.Struct, form: str, render: Any) -> int:
    """Print a result in `form` (text, by `render`, or json); returns the exit code. Raises `BlkmigError`."""
    text = as_json(outcome) if form == "json" else render(outcome)
    try:
        print(text, flush=True)
    except OSError as error:
        # Python would try to flush it once more when it exits, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise BlkmigError(
            f"the result could not be written to stdout: {error.strerror}", state="what was asked for is done"
        ) from error
    return 0
