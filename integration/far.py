"""The laboratory with its destination on another host: `Lab`, `Bench` and `Attempt` as they are, but over ssh."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from integration.hosts import PORT, Hosts
from integration.lab import Guest, Lab, LabError, laid_out
from integration.network import Network
from qemu_blkmig.demo.guest import Kernel


class FarLab(Lab):
    """Guests and the tool are in hosta, `target` and the guests' destinations in hostb."""

    agent_words = ("qemu_blkmig", "receive")

    def __init__(self, directory: Path, kernel: Kernel, initramfs: Callable[[bool], Path], mark: str) -> None:
        super().__init__(directory, kernel, initramfs, mark)
        self.hosts = Hosts(directory)
        self.network = Network(self.hosts)
        self.target = self.hosts.far / "target"

    @property
    def entering(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `Lab`."""
        return self.hosts.enter

    @property
    def place(self) -> str:
        """See `Lab`."""
        return f"ssh://root@hostb:{PORT}{self.target}"

    def boot(self, *arguments: object, **options: object) -> Guest:
        """See `Lab`."""
        guest = super().boot(*arguments, **options)  # type: ignore[arg-type]
        guest.far = self.hosts.far
        return guest

    def destination(self, guest: Guest, directory: Path | None = None) -> Guest:
        """See `Lab`."""
        launched = super().destination(guest, directory)
        launched.outside = self.hosts.outside
        return launched

    def left_elsewhere(self) -> list[str]:
        """What of ours is in hostb's folders and both hosts' /run, and connections to sshd."""
        found = [f"a connection: process {pid}" for pid in self.hosts.connections()]
        for host, root in (("hosta", self.hosts.root_a), ("hostb", self.hosts.root_b)):
            for folder in ("run", "var/lib/qemu-blkmig"):
                found += [f"{host}: {path}" for path in (root / folder).rglob("*blkmig*")]
        for folder in ("tmp", "state"):
            found += [str(path) for path in (self.hosts.far / folder).glob("*")]
        return found

    def restore(self) -> None:
        """See to it that hostb runs and can be reached."""
        if not self.hosts.is_up:
            self.hosts.boot()
        self.network.up()

    def put_in_order(self) -> None:
        """See `Lab`; hostb is rebooted and as it was at first."""
        self.hosts.reset()
        super().put_in_order()
        for folder in (self.hosts.far / "tmp", self.hosts.far / "state"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def close(self) -> None:
        """See `Lab`."""
        with contextlib.suppress(LabError):
            self.hosts.close()
        super().close()


@contextlib.contextmanager
def far_laboratory(kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[FarLab]:
    """A `FarLab`; all that was started in it ends with it."""
    with laid_out(FarLab, kernel, initramfs) as lab:
        yield lab
