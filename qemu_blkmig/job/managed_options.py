"""What the user asked for where libvirt manages the guest (`virsh-blkmigrate`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.moment import AT_ONCE, Moment
from qemu_blkmig.job.options import Afterwards, OnStall, Selection, Transfer, Verify, check_convergence
from qemu_blkmig.job.place import Place, Ssh

_TCP = re.compile(r"tcp:(?://)?(?P<host>\[[^\]]+\]|[^\[\]:/]+)(?::(?P<port>\d+))?/?")


@dataclass(frozen=True)
class ManagedOptions:
    """A domain's migration with its disks. `downtime` and `timeout` in seconds, `max_rounds` None: no bound.

    `unsafe`: what is left behind may lie on storage that is not shared: a disk that is not copied, or that libvirt does
    not know of, and persistent memory.

    `domain`: name or UUID. `source_uri`: this host's libvirt (None: its default); `target_uri`: the destination's, as
    this host reaches it. `place`: where the agent runs. `live` False: the guest is paused while it moves, and runs
    there. `offline`: the domain does not run, and is to be defined there. `xml`, `persistent_xml`: contents for the
    destination, in place of the domain's own. `migrate_uri`: where the destination's QEMU listens, as this host reaches
    it (None: a unix socket through ssh). `timeout`: after that the guest is paused until it has moved. `paths`: of
    images there, by the disk's target. `pool`: of libvirt, there, that takes all other images; or `directory`, there,
    that does.
    """

    domain: str
    target_uri: str
    place: Place
    source_uri: str | None = None
    selection: Selection = field(default_factory=Selection)
    transfer: Transfer = field(default_factory=Transfer)
    downtime: float = 0.3
    max_rounds: int | None = 30
    on_stall: OnStall = OnStall.ABORT
    switchover: Moment = AT_ONCE
    verify: Verify = Verify.WRITTEN
    put_off: bool = True
    source_images: Afterwards = Afterwards.KEEP
    live: bool = True
    offline: bool = False
    peer_to_peer: bool = False
    persistent: bool = False
    undefine_source: bool = False
    suspend: bool = False
    auto_converge: bool = False
    auto_converge_initial: int | None = None
    auto_converge_increment: int | None = None
    tls: bool = False
    tls_destination: str | None = None
    abort_on_error: bool = False
    unsafe: bool = False
    dname: str | None = None
    graphics_uri: str | None = None
    xml: str | None = None
    persistent_xml: str | None = None
    migrate_uri: str | None = None
    listen_address: str | None = None
    timeout: float | None = None
    paths: Mapping[str, str] = field(default_factory=dict)
    pool: str | None = None
    directory: str | None = None

    def __post_init__(self) -> None:
        check_convergence(self.downtime, self.max_rounds)
        if self.paths and self.pool is None and not all(path.startswith("/") for path in self.paths.values()):
            raise UsageError("the path of an image at the destination must be absolute")
        if self.offline and not self.persistent:
            raise UsageError("--offline needs --persistent: a domain that does not run is defined, or it is not there")
        if self.persistent_xml is not None and not self.persistent:
            raise UsageError("--persistent-xml is of no use without --persistent")
        if self.listen_address is not None and self.migrate_uri is None:
            raise UsageError("--listen-address needs --migrateuri: without it QEMU listens on a unix socket")
        if self.migrate_uri is not None:
            migration_address(self.migrate_uri)
        if self.dname is not None and ("/" in self.dname or not self.dname.strip()):
            raise UsageError(f"--dname {self.dname!r}: libvirt knows no domain by such a name")
        for name, value in (
            ("--auto-converge-initial", self.auto_converge_initial),
            ("--auto-converge-increment", self.auto_converge_increment),
        ):
            if value is not None and not 1 <= value <= 99:
                raise UsageError(f"{name} must be between 1 and 99")


def with_other_xml(job: str) -> str:
    """What to do where libvirt refuses the XML that was given for the destination."""
    return (
        f"virsh-blkmigrate --resume {job} --xml FILE goes on with other XML, qemu-blkmig resume {job} with what it has"
    )


def name_for_tls(options: ManagedOptions) -> str:
    """What the destination's certificate for --tls must name: the host that RAM goes to, or as the user says."""
    if options.tls_destination is not None:
        return options.tls_destination
    if options.migrate_uri is not None:
        return migration_address(options.migrate_uri)[0]
    return options.place.host if isinstance(options.place, Ssh) else ""


def migration_address(uri: str) -> tuple[str, int | None]:
    """Host and port (None: any that is free) of --migrateuri. Raises `UsageError`."""
    match = _TCP.fullmatch(uri)
    port = int(match["port"]) if match and match["port"] else None
    if match is None or not 1 <= (port or 1) <= 65535:
        raise UsageError(f"not a migration URI: {uri!r}", advice="write tcp://HOST:PORT")
    return match["host"].strip("[]"), port
