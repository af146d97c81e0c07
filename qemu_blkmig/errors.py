"""The one tree of exceptions, each with what happened, to which disk, the state of things, and what to do next.

    BlkmigError                    exit 1   base; never raised itself
     +- RequestError                        one request was refused; the connection is intact: it may be repeated
     +- ConnectionLost                      the peer is gone and the fate of what was under way is unknown: reconnect
     +- StreamError                         what was read is no stream of the old wire format (offset)
     +- MigrationError                      the migration failed, the source guest is the truth
     |   +- TopologyChanged                 a snapshot, pivot, unplug, hot-plug or block job came in between
     |   |   +- DisksInUse                  a backup, mirror job or export is at work on disks that are the same still
     |   +- GuestStateError                 the guest shut down, crashed, or is in a state that cannot be migrated
     |   +- Stalled                         the predicted downtime does not come under the limit
     |   +- SourceReadError                 the source disk cannot be read (offset)
     |   +- DestinationWriteError           the destination image cannot be written (offset, errno)
     |   +- DestinationFailed               the destination's QEMU or agent failed
     |   +- RecordFailed                    the job's record, without which nothing may be done, cannot be written
     |   +- WatchdogGone                    the job's watchdog ended, or hangs; no guest is paused without one
     |   +- LibvirtFailed                   libvirt could not migrate the domain, and gave the guest back
     +- Refused                    exit 3   preflight: nothing that existed before was touched
     +- Undecided                  exit 4   which side owns the guest cannot be known; a person must look
     +- ContentsDiffer             exit 5   source and destination differ
     +- UsageError                 exit 2
     +- Interrupted                128+n    by signal n

The layers below `job` fill in *what* and *disk*; `job` adds *state* and *advice*, because only it knows them.
"""

from __future__ import annotations

import re
import signal


class BlkmigError(Exception):
    """What happened (`what`), to which disk (`disk`), how things stand now (`state`), what to do next (`advice`)."""

    exit_code = 1
    mendable = False
    """Whether what happened can pass, or be mended, so that the job is to be resumed rather than given up."""
    lasting = False
    """Whether another attempt, with nothing changed, would end the same way."""
    suspended: str | None = None
    """The job that can be resumed, where there is one."""

    def __init__(
        self, what: str, *, disk: str | None = None, state: str | None = None, advice: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.disk = disk
        self.state = state
        self.advice = advice

    def __str__(self) -> str:
        return f"disk {self.disk}: {self.what}" if self.disk else self.what


class RequestError(BlkmigError):
    """One request was refused by a peer that is still there; it may be repeated."""


class ConnectionLost(BlkmigError):
    """The peer is gone; what became of the requests under way cannot be known."""

    mendable = True


class StreamError(BlkmigError):
    """A migration stream is truncated, corrupt, or of a form that is not understood, at `offset` (bytes)."""

    def __init__(self, what: str, *, offset: int, disk: str | None = None) -> None:
        super().__init__(f"byte {offset} of the stream: {what}", disk=disk)
        self.offset = offset


class MigrationError(BlkmigError):
    """The migration failed; the source guest is the truth."""


class TopologyChanged(MigrationError):
    """The guest's disks are no longer those that the migration started with."""


class DisksInUse(TopologyChanged):
    """Somebody else's backup, mirror job or export is at work on the guest's disks, which are what they were."""

    mendable = True


class GuestStateError(MigrationError):
    """The guest shut down, crashed, or is in a run state that cannot be migrated."""


class Stalled(MigrationError):
    """The last round does not come to fit the downtime limit."""

    mendable = True


class SourceReadError(MigrationError):
    """The source cannot be read at `offset` (bytes)."""

    mendable = True

    def __init__(self, what: str, *, disk: str, offset: int) -> None:
        super().__init__(what, disk=disk)
        self.offset = offset


class DestinationWriteError(MigrationError):
    """The destination cannot be written at `offset` (bytes; None where it is no matter of place); `errno` tells why."""

    mendable = True

    def __init__(self, what: str, *, disk: str, offset: int | None, errno: int) -> None:
        super().__init__(what, disk=disk)
        self.offset = offset
        self.errno = errno


class DestinationFailed(MigrationError):
    """The destination's QEMU or the agent beside its storage failed."""

    mendable = True


class HostSilent(DestinationFailed):
    """The destination host did not answer while the guest stood still, which was not made to wait for it."""


class RecordFailed(MigrationError):
    """What must be on disk before the next step cannot be written there."""

    mendable = True


class WatchdogGone(MigrationError):
    """The job's watchdog ended, or hangs; without one no guest may be paused."""

    mendable = True


class LibvirtFailed(MigrationError):
    """libvirt could not migrate the domain, or gave it up; it gives the guest back at the source.

    `aborted`: somebody has told it to. `busy`: it was at something else with that domain for too long (a dump).
    """

    mendable = True
    aborted = busy = False


class Refused(BlkmigError):
    """Preflight refused; nothing that existed before was touched."""

    exit_code = 3


class Undecided(BlkmigError):
    """Which side owns the guest cannot be known from here, or something is left undone though it has arrived; a person
    must look.
    """

    exit_code = 4


class ContentsDiffer(BlkmigError):
    """Source and destination differ, first at `offset` (bytes)."""

    exit_code = 5

    def __init__(self, what: str, *, disk: str, offset: int, advice: str | None = None) -> None:
        super().__init__(what, disk=disk, advice=advice)
        self.offset = offset


class UsageError(BlkmigError):
    """The command line makes no sense."""

    exit_code = 2


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""That ask us to stop."""


class Interrupted(BlkmigError):
    """A signal, or another `what`, asked us to stop; the exit code is 128 + the signal's number."""

    def __init__(
        self, signum: int, what: str | None = None, *, state: str | None = None, advice: str | None = None
    ) -> None:
        super().__init__(what or f"interrupted by {signal.Signals(signum).name}", state=state, advice=advice)
        self.signum = signum
        self.exit_code = 128 + signum
        self.mendable = signum == signal.SIGHUP


def kind_of(error: type[BlkmigError]) -> str:
    """What programs know an error by: the nearest class of this tree, such as `source-read`."""
    kind = next(each for each in error.__mro__ if each.__module__ == __name__)
    return re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__.removesuffix("Error")).lower()
