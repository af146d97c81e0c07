"""The agent's side of comparing: digests of what a prepared image holds, read through its writer's own way."""

from __future__ import annotations

import contextlib
import errno
import os

from qemu_blkmig import errors
from qemu_blkmig.destination import protocol
from qemu_blkmig.destination.sink import write_error
from qemu_blkmig.destination.writers import Writer
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.nbd.digests import digests_of, fault_of


def digests(op: protocol.Digests, size: int, writer: Writer, descriptor: int, control: Control) -> bytes:
    """What `op` asks for, of an image of `size` bytes whose file is open on `descriptor`; see `nbd.digests`. Blocks.

    The page cache lets go of what is stable, so that it is read from the storage where it can be (posix_fadvise(2)).
    Raises `Refused`, `Cancelled`, `DestinationWriteError`.
    """
    extent = Extent(op.offset, op.length)
    if (fault := fault_of(extent, op.unit, size)) is not None:
        raise errors.Refused(fault, disk=op.disk)
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        return digests_of(writer, extent, op.unit, op.algorithm, control)
    except OSError as error:
        raise write_error(op.disk, op.offset, error.errno or errno.EIO, "read back") from error
    except errors.ConnectionLost as error:
        what = f"the destination cannot be read back: {error}"
        raise errors.DestinationWriteError(what, disk=op.disk, offset=op.offset, errno=0) from error
