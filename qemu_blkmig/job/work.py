"""What does the work of a job, by what was asked for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import CopyOptions, MigrateOptions

if TYPE_CHECKING:
    from qemu_blkmig.job.result import Result


def work_of(options: MigrateOptions | CopyOptions | ManagedOptions) -> Callable[..., Awaitable[Result]]:
    """What does what was asked for; of all that a job may be, only this is loaded."""
    if isinstance(options, MigrateOptions):
        from qemu_blkmig.job.migrate import migrate

        return migrate
    if isinstance(options, CopyOptions):
        from qemu_blkmig.job.copy import copy

        return copy
    if options.offline:
        from qemu_blkmig.job.managed_offline import move_offline

        return move_offline
    from qemu_blkmig.job.managed import migrate_managed

    return migrate_managed
