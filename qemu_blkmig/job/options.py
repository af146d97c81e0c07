"""What the user asked for."""

from __future__ import annotations

import enum
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qemu_blkmig.destination.protocol import MOST_IN_FLIGHT
from qemu_blkmig.errors import UsageError
from qemu_blkmig.hashing import USUAL, Algorithm
from qemu_blkmig.job.datapath import DataPath
from qemu_blkmig.job.moment import AT_ONCE, Moment
from qemu_blkmig.job.place import Place

TOO_FAST = 1 << 63
"""Bytes a second: libvirt, and what a journal is kept in, count no further."""


def _power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


class OnStall(enum.Enum):
    """What to do when the last round does not come to fit the downtime. THROTTLE: slow the guest's disk writes."""

    WAIT = "wait"
    PAUSE = "pause"
    ABORT = "abort"
    THROTTLE = "throttle"


class Afterwards(enum.Enum):
    """What becomes of the source's images once the guest is at the destination and the source QEMU has ended."""

    KEEP = "keep"
    RENAME = "rename"
    DELETE = "delete"


def check_bandwidth(rate: int | None) -> None:
    """Raise `UsageError` unless `rate` (bytes a second; None: no limit) can be a bandwidth."""
    if rate is not None:
        _check_rate("--bandwidth", rate)


def _check_rate(option: str, rate: int) -> None:
    if rate < 64 << 10:
        raise UsageError(f"{option} must be at least 64k (bytes a second)")
    if rate >= TOO_FAST:
        raise UsageError(f"{option} must be less than {TOO_FAST >> 20} (MiB a second)")


def check_downtime(downtime: float) -> None:
    """Raise `UsageError` unless `downtime` (seconds) can be aimed at."""
    if not 0.001 <= downtime <= 2000:
        raise UsageError("--downtime must be from 1 to 2000000 milliseconds")


class Verify(enum.Enum):
    """What is proven of the destination before the guest is handed over.

    WRITTEN: that what was read at the source is what lies there. FULL: also that nothing was missed.
    """

    NONE = "none"
    WRITTEN = "written"
    FULL = "full"


@dataclass(frozen=True)
class Transfer:
    """How bytes are carried; sizes in bytes, `bandwidth` in bytes a second (None: no limit).

    `adaptive`: slower where the guest's disks become slow by it.
    `hash`: what contents are compared by, both sides' or what was written and what lies there. `data`: the data's own
    way to a guest's disks; None: ssh's. `group`: name and budget, in bytes a second, of the jobs that share one.
    `slots`: how many jobs may be in their bulk pass at once (None: any number).
    """

    chunk_size: int = 1 << 20
    granularity: int = 64 << 10
    connections: int = 1
    requests: int = 8
    request_size: int = 1 << 20
    bandwidth: int | None = None
    hash: Algorithm = USUAL
    data: DataPath | None = None
    group: tuple[str, int] | None = None
    slots: int | None = None
    adaptive: bool = False

    def __post_init__(self) -> None:
        if not _power_of_two(self.granularity) or not 512 <= self.granularity <= 2 << 30:
            raise UsageError("--granularity must be a power of two from 512 to 2G (QEMU's dirty bitmaps have it so)")
        if not _power_of_two(self.chunk_size) or not 64 << 10 <= self.chunk_size <= 32 << 20:
            raise UsageError("--chunk-size must be a power of two from 64k to 32M")
        if not _power_of_two(self.request_size) or not 64 << 10 <= self.request_size <= 32 << 20:
            raise UsageError(
                "--request-size must be a power of two from 64k to 32M (the largest an NBD server must take)"
            )
        for name, count in (("--connections", self.connections), ("--requests", self.requests)):
            if not 1 <= count <= 64:
                raise UsageError(f"{name} must be from 1 to 64")
        check_bandwidth(self.bandwidth)
        if self.group is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", self.group[0]):
            raise UsageError(f"{self.group[0]!r} is no name of a group: letters, digits, dots, hyphens, underscores")
        if self.group is not None:
            _check_rate("--bandwidth-group", self.group[1])
        if self.slots is not None and not 1 <= self.slots <= 1000:
            raise UsageError("--slots must be from 1 to 1000")
        if self.connections * self.requests * self.request_size > MOST_IN_FLIGHT:
            raise UsageError(
                "--connections x --requests x --request-size must not exceed 1G: it is memory, for each disk"
            )


@dataclass(frozen=True)
class Target:
    """Where to: images at `place`; there a QEMU already waiting at `qmp`, or one to be started by `launch`, or none.

    `ram_uri`: for QEMU's `migrate` and `migrate-incoming`, where RAM is not to go the way of everything else.
    """

    place: Place
    qmp: str | None = None
    launch: str | None = None
    ram_uri: str | None = None

    def __post_init__(self) -> None:
        if self.launch is None:
            return
        try:
            words = shlex.split(self.launch)
        except ValueError as error:
            raise UsageError(f"--launch is no shell command: {error}") from error
        if not words:
            raise UsageError("--launch is empty")


class BaseCheck(enum.Enum):
    """How a shared base is compared. FULL: by content; SIZE: only its virtual size; NONE: it is taken on trust."""

    FULL = "full"
    SIZE = "size"
    NONE = "none"


@dataclass(frozen=True)
class Selection:
    """Which disks, and what the destination may be taken to hold.

    `compare`: images that are there hold older copies of the disks; only what differs is sent. `base`: which file of
    the source's chain is the shared base, where it is not told by what the destination has. `base_hash`: what bases
    are compared by. `flatten`: the layers above the base become one
    (else see `layers`).
    """

    disks: tuple[str, ...] | None = None
    shared_base: bool = False
    target_is_zero: bool = False
    allow_plaintext: bool = False
    ignore_ownership: bool = False
    drop_snapshots: bool = False
    preallocation: Literal["off", "metadata", "falloc", "full"] = "off"
    keep_bitmaps: bool = True
    compare: bool = False
    base: str | None = None
    base_check: BaseCheck = BaseCheck.FULL
    base_hash: Algorithm = USUAL
    flatten: bool = True

    def __post_init__(self) -> None:
        if not self.shared_base and (self.base is not None or not self.flatten):
            raise UsageError("--base and --flatten no are for --shared-base")
        if self.compare and self.target_is_zero:
            raise UsageError("--compare and --target-is-zero contradict each other")


@dataclass(frozen=True)
class MigrateOptions:
    """`qemu-blkmig migrate`; `downtime` in seconds, `max_rounds` None: no bound.

    `put_off`: what the guest writes all the time is copied last.
    """

    source: str
    target: Target
    selection: Selection = Selection()
    transfer: Transfer = Transfer()
    downtime: float = 0.3
    max_rounds: int | None = 30
    on_stall: OnStall = OnStall.ABORT
    pause_only: bool = False
    switchover: Moment = AT_ONCE
    keep_source: bool = False
    source_images: Afterwards = Afterwards.KEEP
    verify: Verify = Verify.WRITTEN
    put_off: bool = True

    def __post_init__(self) -> None:
        if self.source_images is not Afterwards.KEEP and (self.keep_source or self.pause_only):
            raise UsageError("--source-images rename and delete are for when the source QEMU is made to quit")
        ways = (self.target.qmp is not None, self.target.launch is not None, self.pause_only)
        if sum(ways) != 1:
            raise UsageError(
                "name the destination's QEMU in exactly one way: --target-qmp SOCK (already waiting with "
                "-incoming defer), --launch CMD (we start it), or --pause-only (disks only)"
            )
        check_convergence(self.downtime, self.max_rounds)

    @property
    def place(self) -> Place:
        """Where the images go."""
        return self.target.place


def check_convergence(downtime: float, max_rounds: int | None) -> None:
    """Raise `UsageError` unless rounds can aim at `downtime` (seconds), at most `max_rounds` of them."""
    check_downtime(downtime)
    if max_rounds is not None and max_rounds < 1:
        raise UsageError("--max-rounds must be at least 1")


@dataclass(frozen=True)
class CopyOptions:
    """`qemu-blkmig copy`: from a running guest (`source`: QMP socket) or an image file (`image`).

    `image_there`: where an image file goes, if not into the directory under its own name. `owner_there`: uid and gid
    that it is to have there (None: the agent's own).
    `freeze_limit`: seconds that the guest's file systems may stay frozen, or the guest paused, at most.
    """

    target: Target
    source: str | None = None
    image: str | None = None
    image_format: str | None = None
    image_there: str | None = None
    agent: str | None = None
    selection: Selection = Selection()
    transfer: Transfer = Transfer()
    downtime: float = 0.3
    max_rounds: int | None = 30
    freeze_limit: float = 10.0
    verify: Verify = Verify.WRITTEN
    owner_there: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_copy(self)

    @property
    def place(self) -> Place:
        """Where the images go."""
        return self.target.place


@dataclass(frozen=True)
class SaveOptions:
    """`qemu-blkmig save`: disks of a running guest (`source`) or an image file into a stream of the old wire format.

    `to`: where (`stream.channel.FORMS`). `for_qemu`: a real QEMU receives. `machine`: the machine type that the stream
    names; None: the source's own. `configuration`: whether it names one at all. `names`: by disk, in the stream.

    `transfer`: with more than 4 MiB under way QEMU 7.2 gives its buffers' memory back and faults it in again for every
    request: twice the processor time a GiB (100,000 page faults, none with 4 x 1 MiB).
    """

    to: str
    source: str | None = None
    image: str | None = None
    image_format: str | None = None
    agent: str | None = None
    selection: Selection = Selection()
    transfer: Transfer = Transfer(granularity=1 << 20, request_size=1 << 20)
    downtime: float = 0.3
    max_rounds: int | None = 30
    freeze_limit: float = 10.0
    for_qemu: bool = False
    machine: str | None = None
    configuration: bool = True
    footers: bool = True
    zero_blocks: bool = True
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def verify(self) -> Verify:
        """A stream cannot be compared with its source."""
        return Verify.NONE

    def __post_init__(self) -> None:
        _check_copy(self)
        if self.transfer.granularity != 1 << 20:
            raise UsageError("a stream has chunks of 1 MiB, so writes are tracked in units of 1 MiB")
        if self.transfer.request_size < 1 << 20:
            raise UsageError("--request-size must be at least 1M: a stream has chunks of that size")
        if self.machine is not None and not self.configuration:
            raise UsageError("--machine and --no-configuration contradict each other")
        if self.for_qemu and self.image is not None and self.machine is None and self.configuration:
            raise UsageError("a QEMU compares the machine type: name it by --machine, or say --no-configuration")


def _check_copy(options: CopyOptions | SaveOptions) -> None:
    check_convergence(options.downtime, options.max_rounds)
    if not 0.1 <= options.freeze_limit <= 3600:
        raise UsageError("--freeze-limit must be from 0.1 to 3600 seconds")
    if options.image is not None and options.agent is not None:
        raise UsageError("--agent is for a running guest (qmp:SOCK); an image file has none")
    if options.image is not None and options.transfer.data is not None:
        raise UsageError("--data is for a running guest (qmp:SOCK): an image file is served by no QEMU")
    if options.source is not None and options.image_format is not None:
        raise UsageError("--source-format is for an image file (image:PATH); a guest's QEMU tells the formats")
