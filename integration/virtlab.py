"""Guests of libvirt's in the laboratory of two hosts, which write all the time, and the judges of what became of them.

Their images lie in /var/lib/libvirt/images, of which each host has its own.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from integration.hosts import PORT, REPOSITORY
from integration.lab import Disk, Format, LabError, assert_records_sound, wait_until, write_random
from integration.listened import Listened, held_at
from integration.processes import holding
from integration.tool import COMMAND, Outcome, finish, start
from integration.virthosts import VirtHosts, domain_xml, two_virt_hosts
from qemu_blkmig.demo.guest import Kernel, Orders

IMAGES = Path("/var/lib/libvirt/images")
POOL = "vm"
"""The pool of `pooled_laboratory`; its directory lies in IMAGES under the same name."""
VIRSH = [sys.executable, "-m", "qemu_blkmig.cli.virsh_blkmigrate"]
BOOT = 120.0
"""Seconds that a guest may take to write, on a busy machine too."""


@dataclass(frozen=True)
class Domain:
    """A guest; `disks` as the hosts see them."""

    lab: VirtLab
    name: str
    disks: tuple[Disk, ...]

    def console(self, *, far: bool) -> str:
        """What it printed on that host."""
        path = self.lab.outside(IMAGES / f"{self.name}.console", far=far)
        return path.read_text(errors="replace") if path.exists() else ""

    def acked(self, *, far: bool = False) -> int:
        """The largest record number that it has said, on that host, is written."""
        found = re.findall(r"^blkmig ack \w+ seq (\d+) ", self.console(far=far), re.MULTILINE)
        return max(map(int, found), default=0)

    def longest_gap(self, *, far: bool) -> float:
        """Seconds of the longest time between two completed writes that it told on that host."""
        gaps = re.findall(r"^blkmig ack \w+ seq \d+ gap_us (\d+)\r?$", self.console(far=far), re.MULTILINE)
        return max(map(int, gaps), default=0) / 1e6

    def wait_for_writing(self, *, far: bool = False, more: int = 1) -> int:
        """Wait until it has acknowledged `more` further records on that host; the number."""
        before = self.acked(far=far)
        wait_until(
            lambda: self.acked(far=far) >= before + more, "the guest's writes", BOOT,
            lambda: self.console(far=far)[-2000:],
        )  # fmt: skip
        return self.acked(far=far)

    def state(self, *, far: bool = False) -> str | None:
        """libvirt's word for its state there; None where libvirt does not know it."""
        return self.lab.hosts.domains(far=far).get(self.name)

    def runs(self) -> list[str]:
        """The hosts on which it runs."""
        return [host for host, far in (("hosta", False), ("hostb", True)) if self.state(far=far) == "running"]

    def destroy(self) -> None:
        """End it wherever it is, and forget it."""
        for far in (False, True):
            for command in ("destroy", "undefine"):
                with contextlib.suppress(LabError):
                    self.lab.hosts.virsh(command, self.name, far=far)


class VirtLab:
    """What the tests have at hand: the two hosts, guests, the tool, the judges."""

    def __init__(self, hosts: VirtHosts, kernel: Kernel, initramfs: Callable[[bool], Path]) -> None:
        self.hosts = hosts
        self._kernel = kernel
        self._initramfs = initramfs
        self._count = 0
        self._kept: Domain | None = None
        for far in (False, True):
            self.outside(IMAGES, far=far).mkdir(exist_ok=True)

    def outside(self, path: Path, *, far: bool) -> Path:
        """A path below /var/lib/libvirt of that host, as it is seen from outside."""
        base = (self.hosts.far if far else self.hosts.near) / "libvirt" / "lib"
        return base / path.relative_to("/var/lib/libvirt")

    def disk(
        self, name: str, size: int, format: Format = "qcow2", *, data: Sequence[tuple[int, int]] = (),
        backing: Disk | None = None,
    ) -> Disk:  # fmt: skip
        """An image of hosta's with random bytes at the extents `data` (offset, length) and holes elsewhere."""
        # What it may have been running has files of that name open.
        self.hosts.revive()
        path = self.outside(IMAGES / name, far=False)
        command = ["qemu-img", "create", "-q", "-f", format]
        if backing is not None:
            # Relative: what it names is to be found from outside, too.
            command += ["-b", backing.path.name, "-F", backing.format]
        subprocess.run([*command, path, str(size)], check=True, cwd=path.parent)
        for offset, length in data:
            write_random(path, format, offset, length)
        return Disk(IMAGES / name, format, size)

    def boot(self, *disks: Disk, orders: Orders | None = None, alter: Callable[[str], str] = str) -> Domain:
        """Define and start a guest on hosta, and wait until it writes. `alter`: its XML."""
        self._count += 1
        name = f"vm{self._count}"
        console = IMAGES / f"{name}.console"
        orders = orders or Orders(rate=100)
        xml = domain_xml(name, disks, orders, self._kernel, self._initramfs(orders.agent), console)
        file = self.hosts.near / f"{name}.xml"
        file.write_text(alter(xml))
        self.hosts.virsh("define", file)
        self.hosts.virsh("start", name)
        domain = Domain(self, name, disks)
        domain.wait_for_writing()
        return domain

    def take(self) -> Domain:
        """A guest with one qcow2 disk, 16 MiB of it data, which writes: the one kept, if there is one.

        Give it back with `keep`.
        """
        domain, self._kept = self._kept, None
        if domain is None:
            return self.boot(self.disk(f"{uuid.uuid4()}.qcow2", 128 << 20, data=[(1 << 20, 16 << 20)]))
        self.hosts.virsh("resume", domain.name)
        domain.wait_for_writing()
        return domain

    def keep(self, domain: Domain) -> None:
        """Keep it, paused, for the next test if it runs on hosta as if nothing had been; else end it."""
        if self._is_well(domain):
            self.hosts.virsh("suspend", domain.name)
            self._kept = domain
        else:
            domain.destroy()
            self.put_in_order()

    def _is_well(self, domain: Domain) -> bool:
        with contextlib.suppress(LabError):
            if domain.runs() != ["hosta"] or domain.state(far=True) is not None or domain.console(far=True):
                return False
            images = self.hosts.virsh("domblklist", domain.name).split()
            asked = '{"execute": "query-named-block-nodes"}', '{"execute": "query-block-exports"}'
            nodes, exports = (self.hosts.virsh("qemu-monitor-command", domain.name, each) for each in asked)
            bare = "blkmig" not in nodes and json.loads(exports)["return"] == []
            settled = not self.jobs() and not self.images_there(domain)
            return bare and settled and images[1::2] == [str(disk.path) for disk in domain.disks]
        return False

    @property
    def target(self) -> str:
        """hostb's libvirt, as hosta's admin names it."""
        return f"qemu+ssh://hostb:{PORT}/system"

    @property
    def entering(self) -> list[str]:
        """Before a command of ours that is to run on hosta."""
        state = self.hosts.near / "state"
        return [*self.hosts.enter, "env", f"PYTHONPATH={REPOSITORY}", f"QEMU_BLKMIG_STATE_DIR={state}"]

    def tool(self, *words: object) -> Outcome:
        """Run qemu-blkmig on hosta to its end."""
        return finish(start([*self.entering, *COMMAND, *map(str, words)]))

    def migrate(self, domain: Domain, *options: object) -> Outcome:
        """Run virsh-blkmigrate to hostb to its end; a busy machine gets more than the usual downtime."""
        return finish(start([*self.entering, *VIRSH, *self._words(domain), *map(str, options)]))

    def virsh(self, *words: object) -> Outcome:
        """Run virsh-blkmigrate with these words to its end."""
        return finish(start([*self.entering, *VIRSH, *map(str, words)]))

    def attempt(self, domain: Domain, *options: object, hold: str | None = None, block: bool = False) -> Listened:
        """Start virsh-blkmigrate to hostb; `hold`, `block`: see `held_at`."""
        go = self.hosts.near / "go"
        command = VIRSH if hold is None else [*held_at(hold, go, block=block), "virsh-blkmigrate"]
        words = [*self._words(domain), "--progress=json", "--max-rounds", "1000", *map(str, options)]
        return Listened([*self.entering, *command, *words], go)

    def _words(self, domain: Domain) -> list[str]:
        return ["--live", domain.name, self.target, "--downtime", "10000"]

    def cleaned_up(self) -> None:
        """Give up what was suspended, if anything was."""
        for job in self.jobs():
            self.tool("cleanup", job).succeeded()

    def put_in_order(self) -> None:
        """Forget what a failed test left of jobs."""
        for path in (self.hosts.near / "state").glob("*/record.json"):
            shutil.rmtree(path.parent)
        for far in (False, True):
            for left in self.outside(Path("/var/lib/libvirt/qemu"), far=far).glob("*blkmig*"):
                left.unlink()

    def boot_owned(self, *disks: Disk, orders: Orders | None = None) -> Domain:
        """`boot` one whose images are QEMU's user's, as they must be where libvirt does not see to that."""
        for disk in disks:
            self.hosts.run("chown", "libvirt-qemu:kvm", disk.path)
        return self.boot(*disks, orders=orders)

    def volumes(self, *, far: bool = True) -> list[str]:
        """What that host's pool POOL knows."""
        return [line.split()[0] for line in self.hosts.virsh("vol-list", POOL, far=far).splitlines() if line.strip()]

    def owner(self, path: Path, *, far: bool = True) -> str:
        """Whose a file of that host's is, and its mode."""
        return self.hosts.run("stat", "-c", "%U:%G %a", path, far=far).strip()

    def images_there(self, domain: Domain) -> list[Path]:
        """Images of the domain that are on hostb."""
        paths = [self.outside(disk.path, far=True) for disk in domain.disks]
        return [path for path in paths if path.exists()]

    def processes(self, *words: str, far: bool) -> list[int]:
        """The processes of that host whose command lines hold all the words."""
        return holding(self.hosts.processes() if far else self.hosts.near_processes(), *words)

    def backup(self, path: Path, mode: Literal["push", "pull"] = "push") -> Path:
        """What to begin a backup of a domain's first disk with: into `path`; pull: of what is served beside that."""
        server = f"<server transport='unix' socket='{path}.nbd'/>" if mode == "pull" else ""
        kind, image_format = ("scratch", "qcow2") if mode == "pull" else ("target", "raw")
        file = self.hosts.near / "backup.xml"
        file.write_text(
            f"<domainbackup mode='{mode}'>{server}<disks><disk name='vda' type='file'>"
            f"<{kind} file='{path}'/><driver type='{image_format}'/></disk></disks></domainbackup>"
        )
        return file

    def jobs(self) -> list[str]:
        """The names of the jobs of which there is a record on hosta."""
        return [path.parent.name for path in (self.hosts.near / "state").glob("*/record.json")]

    def job(self) -> str:
        """The name of the one job that is kept on hosta."""
        (found,) = self.jobs()
        return found

    def assert_arrived(self, domain: Domain, *, paths: Sequence[Path] | None = None) -> None:
        """Assert that it runs on hostb alone, goes on writing, and that no record of its disks is lost or torn.

        It is ended for that.
        """
        assert domain.runs() == ["hostb"], domain.runs()
        domain.wait_for_writing(far=True, more=20)
        self.hosts.virsh("destroy", domain.name, far=True)
        self._assert_sound(domain, paths or [disk.path for disk in domain.disks], far=True)

    def assert_stayed(self, domain: Domain) -> None:
        """Assert that it runs on hosta alone, goes on writing, and that no record of its disks is lost or torn."""
        assert domain.runs() == ["hosta"], domain.runs()
        assert domain.state(far=True) is None, "hostb still knows it"
        assert not domain.console(far=True), "it ran on hostb"
        domain.wait_for_writing(more=20)
        # As with `stop` in QEMU: what it has acknowledged is in the images then.
        self.hosts.virsh("suspend", domain.name)
        self._assert_sound(domain, [disk.path for disk in domain.disks], far=False)
        self.hosts.virsh("resume", domain.name)

    def _assert_sound(self, domain: Domain, paths: Sequence[Path], *, far: bool) -> None:
        acked = max(domain.acked(), domain.acked(far=True))
        for disk, path in zip(domain.disks, paths, strict=True):
            if not disk.read_only:
                # What one disk has acknowledged says nothing of another's.
                image = replace(disk, path=self.outside(path, far=far))
                assert_records_sound(image, acked if len(domain.disks) == 1 else 0)

    def assert_nothing_left(self) -> None:
        """Assert that no job is left on hosta, no connection to hostb's sshd, and no socket of ours on either."""
        left: list[str] = []

        def clean() -> bool:
            jobs = [str(path) for path in (self.hosts.near / "state").glob("*/record.json")]
            connections = [f"connection {pid}" for pid in self.hosts.connections()]
            sockets = [
                str(path) for far in (False, True)
                for path in self.outside(Path("/var/lib/libvirt/qemu"), far=far).glob("*blkmig*")
            ]  # fmt: skip
            left[:] = [*jobs, *connections, *sockets]
            return not left

        wait_until(clean, "everything of ours to be gone", 20, lambda: "; ".join(left))


@contextlib.contextmanager
def virt_laboratory(kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[VirtLab]:
    """A `VirtLab` with hosts of its own."""
    with two_virt_hosts() as hosts:
        yield VirtLab(hosts, kernel, initramfs)


@contextlib.contextmanager
def pooled_laboratory(qemu_conf: str, kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[VirtLab]:
    """A `VirtLab` with hosts of its own, whose QEMUs run as a user of theirs, and each of which has a pool POOL.

    What they boot is copied to where that user may read it, and libvirt own it. Each host has copies of its own: that
    user's group has another number on another system.
    """
    folder = Path(tempfile.mkdtemp(prefix="blkmig-boot-", dir="/var/tmp"))
    folder.chmod(0o755)
    try:
        with two_virt_hosts(qemu_conf=qemu_conf) as hosts:
            theirs = hosts.far / "boot"
            theirs.mkdir(mode=0o755)
            hosts.run("mount", "--bind", theirs, folder, far=True)

            def readable(path: Path) -> Path:
                for place in (folder, theirs):
                    shutil.copyfile(path, place / path.name)
                return folder / path.name

            boot = replace(kernel, image=readable(kernel.image))
            made = VirtLab(hosts, boot, lambda agent: readable(initramfs(agent)))
            for far in (False, True):
                pool = "pool-define-as", POOL, "dir", "--target", IMAGES / POOL
                for command in (pool, ("pool-build", POOL), ("pool-start", POOL)):
                    hosts.virsh(*command, far=far)
            yield made
    finally:
        shutil.rmtree(folder)
