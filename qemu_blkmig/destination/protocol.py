"""The control protocol between coordinator and agent: JSON lines on the agent's stdin and stdout.

Every request carries an `id` that its one reply repeats; replies may come in any order. Between request and reply of
a copy, or one for digests, the agent may send `Progress` and `Space`. Unknown keys and operations are refused; a line
is at most `LINE_LIMIT` bytes. All offsets and lengths are bytes.

A bulk copy may be asked for while others of its disk are under way, if its range follows on the last one's; a flush may
be at any time, and holds for what was answered before.

The life of an agent: hello, inspect | prepare, then per disk open, copy*, flush, ..., close, at the end `bye`.
When stdin ends without `bye`, or nothing was heard for `SILENCE` (a network may be gone without a word), the agent ends
its NBD servers and removes every image that it created and that was not yet closed; a closed image belongs to the
switchover and is only ever removed by `discard`. A QEMU that it launched lives on, to be ended by `end-process`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from qemu_blkmig.destination.files import FileId
from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.hashing import Algorithm
from qemu_blkmig.nbd.address import TcpAddress, UnixAddress

PROTOCOL = 8
LINE_LIMIT = 4 << 20
BATCH_LIMIT = 16_384
"""Most extents in one copy request."""
MOST_CONNECTIONS = 64
MOST_REQUESTS = 64
LARGEST_REQUEST = 32 << 20
"""Bytes of the largest request: what every NBD server takes."""
MOST_IN_FLIGHT = 1 << 30
"""Most bytes of a disk's requests on all its connections together."""

MOST_READ_BACK = 1 << 30
"""Most bytes that are read back at once."""

Count = Annotated[int, msgspec.Meta(ge=0)]


PING = 5.0
"""Seconds between two pings of the coordinator."""
SILENCE = 20.0
"""Seconds without a line from the coordinator, after which it is taken for gone."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Backing(Message, frozen=True):
    """The shared base that an image is created upon; `path` as it is to stand in the image."""

    path: str
    format: str


class Image(Message, frozen=True):
    """What the destination is to hold for one disk; `size` is the virtual size.

    `create`: make it if it is not there. What is there must have this format, size and backing file.
    `known_zero`: the user vouches that the existing image reads as zeroes (a created one always does).
    `origin`: where the disk comes from, in words, for the ownership record. `compared`: what the existing image holds
    will be compared with the source's, so it may hold anything. `preallocation`: of an image that is created, in
    qemu-img's words; zeroes that are written later keep what was allocated. `identity`: it is taken up again where
    another agent left it, and must be this very file; one who still holds it is waited for. `owner`: uid and gid of
    an image that is created, where the agent may give it away.
    """

    disk: str
    path: str
    format: str
    size: int
    create: bool
    known_zero: bool = False
    backing: Backing | None = None
    cluster_size: int | None = None
    origin: str = ""
    compared: bool = False
    preallocation: Literal["off", "metadata", "falloc", "full"] = "off"
    identity: Created | None = None
    owner: tuple[Count, Count] | None = None


class Hello(Message, frozen=True, tag="hello", forbid_unknown_fields=False):
    """`job`: whose agent this is, None for one that only looks. A later protocol's may hold more: not refused."""

    version: str
    protocol: int
    job: str | None = None


class Inspect(Message, frozen=True, tag="inspect"):
    """Find everything that `Prepare` would fail on, and touch nothing."""

    images: list[Image]


class Domain(Message, frozen=True):
    """libvirt's name and UUID of the guest."""

    name: str
    uuid: str


class Prepare(Message, frozen=True, tag="prepare"):
    """Check, lock and create the images; all or none. With a `job` its ownership records say so from now on.

    `domain`: named in them.
    """

    images: list[Image]
    job: str | None = None
    domain: Domain | None = None


class Open(Message, frozen=True, tag="open"):
    """Connect to the source's export of a prepared disk and start its writer.

    `source`: where the export is reached from there. `private_layers`: with a shared base, how many
    layers of the source's chain are above it; None without one. `requests`: most requests in flight on a connection;
    small ones may be more, their bytes are bounded too. `request_size`: bytes of the largest request. `zero_unit`:
    data is tested for zeroes in units of this many bytes. `hash`: digests of what is written are kept, for `Verify`;
    then all extents must be whole units of `hash_unit` bytes, a power of two from 4 KiB to 1 MiB.
    """

    disk: str
    source: UnixAddress | TcpAddress
    export: str
    connections: int
    requests: int
    request_size: int
    zero_unit: int
    private_layers: int | None = None
    hash: Algorithm | None = None
    hash_unit: int = 64 << 10


class Copy(Message, frozen=True, tag="copy"):
    disk: str
    kind: Literal["bulk", "dirty"]
    extents: list[tuple[int, int]]


class Flush(Message, frozen=True, tag="flush"):
    disk: str


class Bandwidth(Message, frozen=True, tag="bandwidth"):
    """Limit the payload of all disks together to `rate` bytes a second; None: no limit."""

    rate: int | None


class Payload(Message, frozen=True, tag="payload"):
    """Tell how much payload, which `Bandwidth` limits, there was so far."""


class Cancel(Message, frozen=True, tag="cancel"):
    """End what is under way on `disk` (None: on all), a copy or reading for digests; its reply: kind "cancelled"."""

    disk: str | None = None


class Close(Message, frozen=True, tag="close"):
    """End the disk's writer: flushed, NBD server exited, lock dropped."""

    disk: str


class Keep(Message, frozen=True, tag="keep"):
    """From now on images stay, whatever becomes of the coordinator or the agent; only `Discard` removes them."""


class Discard(Message, frozen=True, tag="discard"):
    """Remove images that an agent created, told by the identity in `Created`; others and those in use are left.

    Their ownership records go with them. `given_up`: images, also those that are left, of which nobody will ask any
    more whether they are as they were written: the hashes of that go. `unless_written`: those stay, too, that
    somebody may have written to since the last agent had them.
    """

    images: list[Created]
    given_up: list[str] = []
    unless_written: bool = False


class Mark(Message, frozen=True, tag="mark"):
    """Bring the ownership records of `job`'s images (paths) to `state`.

    complete: the guest is theirs. untouched: nothing was written to them, what was recorded before holds again.
    Records of others are left alone. `domain`: named in those that are written.
    """

    job: str
    images: list[str]
    state: Literal["complete", "untouched"]
    domain: Domain | None = None


class Expect(Message, frozen=True, tag="expect"):
    """Tell libvirt's hook there that `domain` is to come, with these paths of its disks (by target), from `peer`.

    It holds until the agent ends, or the domain has ended there; to be said anew before another attempt.
    """

    domain: Domain
    disks: dict[str, str]
    peer: str = ""


class Digests(Message, frozen=True, tag="digests"):
    """Tell digests of what an open disk's image holds from `offset`, each of `unit` bytes; at most `nbd.digests.MOST`.

    What was copied and not yet flushed counts. `offset` is a multiple of `unit`, a power of two.
    """

    disk: str
    offset: int
    length: int
    unit: int
    algorithm: Algorithm


class Verify(Message, frozen=True, tag="verify"):
    """Read back about `limit` bytes of what was written to `disk` and not read back since.

    It is flushed first, and read past the page cache where possible. Ends early when a copy of the disk waits.

    `below`: only what lies before that byte, all of which is stable, beside copies of the first pass that lie behind
    it; nothing where that cannot be.
    """

    disk: str
    limit: int
    below: int | None = None


class Arrived(Message, frozen=True, tag="arrived"):
    """Of a disk that is gone on with: tell what lies there, from `offset` on, as it was to be written.

    It is flushed first, and about `limit` bytes are read past the page cache where possible. What is not told is to be
    copied again.
    """

    disk: str
    offset: int
    limit: int


class Recognize(Message, frozen=True, tag="recognize"):
    """Of a disk that is gone on with, and not written to yet: refused if what lies there is another's.

    That is told by samples before byte `end`, where all was stable when it was left.
    """

    disk: str
    end: int


class BaseDigest(Message, frozen=True, tag="base-digest"):
    """Tell what the base image at `path`, with its backing chain, holds; `algorithm` None: just its size.

    It is known from before when no file of the chain has changed since.
    """

    disk: str
    path: str
    format: str
    algorithm: Algorithm | None


class BaseDigests(Message, frozen=True, tag="base-digests"):
    """Tell digests of a range of the base image at `path`; see `Digests`."""

    disk: str
    path: str
    format: str
    offset: int
    length: int
    unit: int
    algorithm: Algorithm


class Bye(Message, frozen=True, tag="bye"):
    """All is well; leave what is there and exit. The sockets' directories of the job's QEMUs go."""


class Ping(Message, frozen=True, tag="ping"):
    """The coordinator is there."""


class Launch(Message, frozen=True, tag="launch"):
    """Have a shell stand by to run `command` in `directory`, with what makes QEMU wait for a migration appended."""

    command: str
    directory: str


class Go(Message, frozen=True, tag="go"):
    """Run what was launched; answered once it listens on its QMP socket, refused with its words when it ended."""


class Output(Message, frozen=True, tag="output"):
    """What the launched process has said last."""


class FindProgram(Message, frozen=True, tag="find-program"):
    """Look for the program that a shell command, run in `directory`, begins with."""

    command: str
    directory: str


class Identify(Message, frozen=True, tag="identify"):
    """Find the process that listens on the unix socket `socket`; refused with what is wrong with it."""

    socket: str


class Alive(Message, frozen=True, tag="alive"):
    """Whether this very process still runs."""

    process: ProcessId


class EndProcess(Message, frozen=True, tag="end-process"):
    """End the process by SIGKILL; `group`: with it all of its process group, for what was launched."""

    process: ProcessId
    group: bool = False


class Held(Message, frozen=True, tag="held"):
    """Which of these images no QEMU has open as an active writer."""

    paths: list[str]


class Files(Message, frozen=True, tag="files"):
    """What tells these files from all others (`files.file_id`); `process`: whose names they are, None: the agent's."""

    names: list[str]
    process: ProcessId | None = None


class Certificates(Message, frozen=True, tag="certificates"):
    """What a server, or a client, has for TLS in `directory` (None: where libvirt's migrations look), see `look`."""

    directory: str | None
    server: bool


class Handshake(Message, frozen=True, tag="handshake"):
    """Go on with this end of a TLS handshake on trial, to which the other `said` that (see `handshake`).

    `begin`: it is a new one. `directory`, `server`: as of `Certificates`. `name`: of the server, as the client asks
    for it; None: it takes any.
    """

    directory: str | None
    server: bool
    said: bytes
    begin: bool = False
    name: str | None = None


class Below(Message, frozen=True, tag="below"):
    """The backing files of each of these qcow2 images, and those that have their data; an agent looks into none that is
    out of its bounds.
    """

    images: list[str]


class Created(Message, frozen=True):
    """An image that the agent made: removable only while it still is this very file.

    Of a block device, which it did not make, device and inode are 0; `known_as`: see `devices.known_as`.
    """

    path: str
    device: int
    inode: int
    known_as: str = ""


Operation = (
    Hello
    | Inspect
    | Prepare
    | Open
    | Copy
    | Flush
    | Bandwidth
    | Payload
    | Cancel
    | Close
    | Discard
    | Mark
    | Digests
    | Verify
    | Arrived
    | Recognize
    | BaseDigest
    | BaseDigests
    | Keep
    | Bye
    | Ping
    | Launch
    | Go
    | Output
    | FindProgram
    | Identify
    | Alive
    | EndProcess
    | Held
    | Files
    | Certificates
    | Handshake
    | Below
    | Expect
)


class Request(Message, frozen=True):
    id: int
    op: Operation


class HelloReply(Message, frozen=True, tag="hello", forbid_unknown_fields=False):
    """`host`: its name there. `boot_id`: see `files.boot_id`. `runtime`: a private directory that ends with the agent,
    "" without a job.

    A later protocol's may hold more.
    """

    version: str
    protocol: int
    host: str = ""
    boot_id: str = ""
    runtime: str = ""


class Problem(Message, frozen=True):
    """Something that would fail; `disk` is None where it concerns all."""

    disk: str | None
    what: str


class Room(Message, frozen=True):
    """Bytes free on the file system `device` (st_dev), where a disk's image is to be created."""

    disk: str
    device: int
    free: Count


class InspectReply(Message, frozen=True, tag="inspect"):
    """`rooms`: of the images that are to be created.

    `there`: paths of images that might have been created, and are there already. `incomplete`: in words, what jobs
    were filling when they ended, and may want to go on with.
    """

    problems: list[Problem]
    rooms: list[Room]
    there: list[str] = []
    incomplete: list[str] = []


class PrepareReply(Message, frozen=True, tag="prepare"):
    """`created`: the images that were made; `identities`: all of them, for `Image.identity`."""

    created: list[Created]
    identities: list[Created] = []


class CopyReply(Message, frozen=True, tag="copy"):
    copied: Count
    zeroed: Count
    skipped: Count
    seconds: Annotated[float, msgspec.Meta(ge=0)]


class VerifyReply(Message, frozen=True, tag="verify"):
    """`checked`: bytes read back now. `left`: bytes that have not been read back as they were written.

    `differ`: extents of what was checked that are not as they were written, about a thousand at most. Each is told
    once: it counts as left, and is to be copied again before it is read back again.
    """

    checked: Count
    left: Count
    differ: list[tuple[int, int]]


class PayloadReply(Message, frozen=True, tag="payload"):
    """Bytes, of all disks together."""

    taken: Count


class ArrivedReply(Message, frozen=True, tag="arrived"):
    """Extents, ascending, disjoint, whole units of what is hashed; a thousand at most."""

    extents: list[tuple[int, int]]


class CloseReply(Message, frozen=True, tag="close"):
    """`allocated`: bytes that the image occupies at the destination."""

    allocated: Count


class DiscardReply(Message, frozen=True, tag="discard"):
    """Paths removed, and those left with the reason."""

    removed: list[str]
    left: list[str]


class DigestsReply(Message, frozen=True, tag="digests"):
    """`digests`: one after the other, base64 on the wire; a unit of zeroes has a digest of zero bytes. Empty: all have.

    `read`: bytes that were read to tell this; the rest is known to be zero.
    """

    digests: bytes
    read: Count


class Launched(Message, frozen=True, tag="launched"):
    """The process that waits for `Go`, and the QMP socket on which QEMU is to listen, which outlives the agent."""

    process: ProcessId
    qmp: str


class Identified(Message, frozen=True, tag="identified"):
    """The process that listens (identify, go); None where that cannot be seen from here."""

    process: ProcessId | None


class OutputReply(Message, frozen=True, tag="output"):
    text: str


class FindProgramReply(Message, frozen=True, tag="find-program"):
    """The program, if it is a plain name that cannot be found; else None."""

    missing: str | None


class AliveReply(Message, frozen=True, tag="alive"):
    """`alive`: the process runs (alive), or still does after all (end-process)."""

    alive: bool


class HeldReply(Message, frozen=True, tag="held"):
    """Paths of the images that nobody holds."""

    idle: list[str]


class FilesReply(Message, frozen=True, tag="files"):
    """In the order asked for. `ids`: None where neither a regular file nor a block device is there. `real`: their
    paths, with links and what else leads there by a way round resolved, also of what is not there. `names`: what
    those of them that other hosts may see, too, are called there (`files.names_everywhere`).
    """

    ids: list[FileId | None]
    real: list[str]
    names: list[list[str]]


class CertificatesReply(Message, frozen=True, tag="certificates"):
    """`directory`: where they are looked for. `missing`: paths of files that are not there. `dated`: of certificates
    that are not valid now, in words that begin with their paths. `by_number`: its own names the serial number of its
    authority's certificate.
    """

    directory: str
    missing: list[str]
    dated: list[str]
    by_number: bool


class Fault(Message, frozen=True):
    """Why an end gives a handshake up, in OpenSSL's `words`.

    Of the other's certificate: dates, authority, name; none-shown: there is none. own: its own cannot be used.
    unclear: that says nothing of the handshake to come.
    """

    kind: Literal["dates", "authority", "name", "none-shown", "own", "unclear"]
    words: str


class HandshakeReply(Message, frozen=True, tag="handshake"):
    """`said`: to the other end; nothing: it waits, or it is over. `names`: of the other's certificate, once known."""

    said: bytes
    fault: Fault | None = None
    names: list[str] = []


class BelowReply(Message, frozen=True, tag="below"):
    """In the order asked for, from the top; `whole`: whether these are all of them, as far as is known."""

    files: list[list[str]]
    whole: list[bool]


class BaseDigestReply(Message, frozen=True, tag="base-digest"):
    """`root`: one digest for all of the virtual disk of `size` bytes, empty where none was asked for.

    `read`: bytes that were read to tell this, 0 where it was known.
    """

    size: int
    root: bytes
    read: int


class Done(Message, frozen=True, tag="done"):
    """Done, with nothing to tell (open, flush, bandwidth, cancel, ping, bye)."""


class Failure(Message, frozen=True, tag="failure"):
    """Why a request failed.

    source-read: the source's export gave an error at `offset`. source-lost: the connection to it broke.
    destination-write: writing, flushing or locking failed, `errno` tells how. refused: the request makes no sense
    here or an image does not fit. cancelled: by `Cancel`. internal: a defect of the agent.
    """

    kind: Literal["source-read", "source-lost", "destination-write", "refused", "cancelled", "internal"]
    what: str
    disk: str | None = None
    offset: int | None = None
    errno: int | None = None
    advice: str | None = None


Outcome = (
    HelloReply
    | InspectReply
    | PrepareReply
    | CopyReply
    | CloseReply
    | DiscardReply
    | DigestsReply
    | VerifyReply
    | ArrivedReply
    | PayloadReply
    | Launched
    | Identified
    | OutputReply
    | FindProgramReply
    | AliveReply
    | HeldReply
    | FilesReply
    | CertificatesReply
    | HandshakeReply
    | BelowReply
    | BaseDigestReply
    | Done
    | Failure
)


class Reply(Message, frozen=True, tag="reply"):
    id: int
    outcome: Outcome


class Progress(Message, frozen=True, tag="progress"):
    """Bytes settled so far in the copy, or the reading for digests, under way on `disk`; at most some ten a second."""

    disk: str
    copied: Count
    zeroed: Count
    skipped: Count


class Space(Message, frozen=True, tag="space"):
    """Bytes that a disk's image at `path` occupies, and those free on its file system `device` (st_dev)."""

    disk: str
    path: str
    device: int
    free: int
    allocated: int


FromAgent = Reply | Progress | Space
