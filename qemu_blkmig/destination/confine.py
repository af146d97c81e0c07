"""What an agent may be asked for, where an administrator has bounds (`receive --root DIR...`).

Whoever holds the key of a forced command may say anything in the protocol: no path of any message, and no file that an
image's own header names, leads out of the roots, whatever links and `..` it is made of; no program is launched, and no
connection made but to whom the connection came from.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_blkmig.destination import protocol
from qemu_blkmig.destination.files import path_for
from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.destination.programs import image_info
from qemu_blkmig.errors import Refused
from qemu_blkmig.nbd.address import X509, Address, TcpAddress, UnixAddress

_FORMATS = ("raw", "qcow2")
"""Formats of images that were there before: of these we know all that their headers can name."""
HARMLESS = (
    protocol.Hello, protocol.Copy, protocol.Flush, protocol.Bandwidth, protocol.Cancel, protocol.Close,
    protocol.Digests, protocol.Verify, protocol.Arrived, protocol.Keep, protocol.Bye, protocol.Ping, protocol.Go,
    protocol.Output, protocol.Recognize, protocol.Payload,
)  # fmt: skip
"""Operations that name nothing but what others have named before; all the rest is checked, or refused."""
_LAYERS = 200
"""Most layers of a backing chain that are looked into."""


@dataclass(frozen=True)
class Bounds:
    """What an administrator allows: the files below `roots` (None: no bounds at all), and two things beside.

    `launch`: programs may be launched. `connect`: TCP connections may be made to anywhere, and not just to `client`,
    the address that the agent's own ssh connection came from.
    """

    roots: Sequence[str] | None = None
    launch: bool = False
    connect: bool = False
    client: str | None = None


NO_BOUNDS = Bounds()


def ssh_client() -> str | None:
    """The address that this process's ssh connection came from, as sshd tells it (SSH_CONNECTION, ssh(1))."""
    return os.environ.get("SSH_CONNECTION", "").partition(" ")[0] or None


class Confinement:
    """Holds an agent to its `bounds`.

    `ours`: whether a path is the agent's own (its sockets); `launched`: processes that its job launched; `waited`:
    QEMUs that were found waiting for its guest.
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        ours: Callable[[str], bool],
        launched: Callable[[], set[ProcessId]],
        waited: Callable[[], set[ProcessId]],
    ) -> None:
        roots = bounds.roots
        self._roots = None if roots is None else [Path(os.path.realpath(root)) for root in roots]
        self._bounds = bounds
        self._ours = ours
        self._launched = launched
        self._waited = waited
        self._identified: set[ProcessId] = set()

    def know(self, process: ProcessId) -> None:
        """`process` listens on a socket that was permitted: it may be asked after."""
        self._identified.add(process)

    @property
    def confined(self) -> bool:
        """Whether there are any bounds."""
        return self._roots is not None

    def permits(self, path: str) -> bool:
        """Whether this file may be looked into."""
        return self._roots is None or self._within(path)

    def concerns(self, op: protocol.Operation) -> bool:
        """Whether `op` names anything that is to be checked."""
        return self.confined and not isinstance(op, HARMLESS)

    def check(self, op: protocol.Operation) -> None:
        """Raise `Refused` if `op` is out of bounds. May read images; call it from a thread."""
        match op:
            case protocol.Inspect() | protocol.Prepare():
                for image in op.images:
                    self._check_image(image)
            case protocol.Discard():
                for path in (*(created.path for created in op.images), *op.given_up):
                    self._check_path(path)
            case protocol.Held():
                for path in op.paths:
                    self._check_path(path)
            case protocol.Files():
                for name in op.names:
                    self._check_path(str(path_for(op.process.pid if op.process else None, name)))
            case protocol.Below():
                # Each file is opened only if `permits` says so.
                return
            case protocol.BaseDigest() | protocol.BaseDigests():
                self._check_path(op.path)
                self.check_base(op)
            case protocol.Open():
                self._check_source(op.source)
            case protocol.Certificates(directory=str(directory)) | protocol.Handshake(directory=str(directory)):
                self._check_path(directory)
            case protocol.Mark():
                for path in op.images:
                    self._check_path(path)
            case protocol.Expect():
                for path in op.disks.values():
                    self._check_path(path)
            case protocol.Identify():
                self._check_socket(op.socket)
            case protocol.Launch() | protocol.FindProgram():
                if not self._bounds.launch:
                    raise Refused(
                        "this agent launches no programs (`receive --root` without --allow-launch)",
                        advice="start the destination's QEMU there, with -incoming defer and its QMP socket within the "
                        "root, and name that by --target-qmp; or have --allow-launch added to the agent's command",
                    )
                self._check_path(op.directory)
            case protocol.Alive():
                if op.process not in self._identified | self._launched() | self._waited():
                    raise Refused(f"process {op.process.pid} is none of this job's")
            case protocol.EndProcess():
                # Whatever has its socket within the roots: another guest's QEMU may, too.
                if op.process not in self._launched() | (set() if op.group else self._waited()):
                    raise Refused(
                        f"process {op.process.pid} is none that this job launched, or that waited for its guest",
                        advice="end it on that host yourself, if it is to end",
                    )
            case _:
                raise Refused(f"a confined agent does not know {type(op).__name__}")

    def check_held(self, image: protocol.Image, *, created: bool) -> None:
        """Raise `Refused` if what an image names is out of bounds, now that nobody else can write to it.

        Before it was locked somebody may have: the holder of the same key, by another connection. `created`: it was
        made by us, and names nothing but its backing file. Call it from a thread.
        """
        if self._roots is None:
            return
        if image.backing is not None:
            self._check_header(str(Path(image.path).parent / image.backing.path), image.backing.format)
        if not created:
            self._check_header(image.path, image.format)

    def check_base(self, op: protocol.BaseDigest | protocol.BaseDigests) -> None:
        """The same of a base, once it is open; that happens where links lead, and names in it belong there."""
        if self._roots is not None:
            self._check_header(os.path.realpath(op.path), op.format)

    def _check_path(self, path: str) -> None:
        if not self._within(path):
            raise Refused(
                f"{path} is out of bounds: this agent works below "
                f"{' and '.join(str(root) for root in self._roots or ())} only",
                advice="choose a directory there, or have the agent's command (`receive --root`) changed",
            )

    def _check_socket(self, path: str) -> None:
        if "\0" in path or not self._ours(path):
            self._check_path(path)

    def _check_source(self, source: Address) -> None:
        match source:
            case UnixAddress(path=path):
                self._check_socket(path)
            case TcpAddress(tls=None):
                raise Refused("this agent reads over TCP with TLS only", advice="use --data tls://, or leave it out")
            case TcpAddress(host=host, tls=tls):
                if isinstance(tls, X509):
                    self._check_path(tls.directory)
                self._check_peer(host)

    def _check_peer(self, host: str) -> None:
        """A name may mean another address by the time it is connected to: only an address is compared."""
        client = self._bounds.client
        known = _address(client) if client is not None else None
        if self._bounds.connect or (known is not None and _address(host) == known):
            return
        raise Refused(
            f"this agent does not connect to {host}: over TCP it reads only from the address that its ssh connection "
            f"came from, {client or 'which sshd did not tell'} (`receive --root` without --allow-connect)",
            advice="write that address, if it is the source host's, in --data tls://ADDRESS; leave --data out; or have "
            "--allow-connect added to the agent's command",
        )

    def _within(self, path: str) -> bool:
        if "\0" in path:
            return False
        place = Path(os.path.realpath(path))
        return any(place.is_relative_to(root) for root in self._roots or ())

    def _check_image(self, image: protocol.Image) -> None:
        self._check_path(image.path)
        if image.backing is not None:
            base = str(Path(image.path).parent / image.backing.path)
            self._check_plain(image.backing.path)
            self._check_path(base)
            self._check_header(base, image.backing.format)
        if os.path.lexists(image.path):
            self._check_header(image.path, image.format)

    def _check_plain(self, name: str) -> None:
        """qemu-img takes `json:...`, `nbd:...` and the like for other things than files."""
        head, colon, _ = name.partition(":")
        if colon and "/" not in head:
            raise Refused(f"{name} is no plain file name")

    def _check_header(self, path: str, image_format: str) -> None:
        """An image names other files: backing files are read, an external data file is written."""
        for _ in range(_LAYERS):
            if not os.path.lexists(path) or image_format == "raw":
                return
            if image_format not in _FORMATS:
                raise Refused(
                    f"{path} has format {image_format}: a confined agent takes {' and '.join(_FORMATS)} images only"
                )
            try:
                kind = Path(path).stat().st_mode
            except OSError as error:
                raise Refused(f"{path}: {error.strerror}") from error
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise Refused(f"{path} is neither a file nor a block device")
            info = image_info(path, image_format)
            data = info.get("format-specific", {}).get("data", {}).get("data-file")
            if data is not None:
                self._check_plain(data)
                # Not beside the image, as a backing file: QEMU takes a relative one from its working directory, ours.
                self._check_path(data)
            backing = info.get("backing-filename")
            if backing is None:
                return
            self._check_plain(backing)
            path = str(Path(path).parent / backing)
            self._check_path(path)
            if "backing-filename-format" not in info:
                raise Refused(f"the header of an image does not say the format of its backing file {path}")
            image_format = info["backing-filename-format"]
        raise Refused(f"more than {_LAYERS} layers: {path}")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for what is no address. An IPv4 address that is written as IPv6, as a socket for both does, is IPv4."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
