"""hosta and hostb, each with a libvirtd of its own: libvirt's side of the laboratory.

python -m integration.virthosts              # a shell in hosta: virsh list; virsh -c qemu+tcp://hostb/system list
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from integration.hosts import ADDRESSES, PORT, TIED, Hosts
from integration.lab import Disk, LabError, wait_until
from qemu_blkmig.demo.guest import Kernel, Orders, odd_memory
from tests.certificates import make_certificates

_PRIVATE = {
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
}
_LIBVIRTD_CONF = """
listen_tls = 0
listen_tcp = 1
listen_addr = "0.0.0.0"
auth_tcp = "none"
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_group = "root"
host_uuid = "{uuid}"
log_outputs = "2:file:{log}"
"""
PLAIN = """
user = "root"
group = "root"
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
dynamic_ownership = 0
remember_owner = 0
migration_address = "0.0.0.0"
"""


AS_DEBIAN = (
    PLAIN.replace('"root"', '"libvirt-qemu"', 1)
    .replace('"root"', '"kvm"', 1)
    .replace("dynamic_ownership = 0\nremember_owner = 0", "dynamic_ownership = 1\nremember_owner = 1")
)
"""QEMUs run as a user of their own, and libvirt gives them their images while they run."""
OWNED_BY_HAND = AS_DEBIAN.replace("dynamic_ownership = 1", "dynamic_ownership = 0")
"""QEMUs run as a user of their own, and libvirt leaves images' owners alone."""


def with_certificates(directory: Path) -> str:
    """PLAIN with certificates for `--tls`, which are made in `directory`; both hosts have to see it."""
    make_certificates(directory, ",".join(f"DNS:{host}" for host in ADDRESSES))
    return f'{PLAIN}migrate_tls_x509_cert_dir = "{directory}"\n'


class VirtHosts(Hosts):
    """Two hosts with libvirtd; `virsh` speaks to either. Raises `LabError` where it does not work.

    `qemu_conf`: of both libvirtds.
    """

    def __init__(self, near: Path, *options: str, qemu_conf: str = PLAIN) -> None:
        self._daemons: dict[bool, subprocess.Popen[bytes]] = {}
        self._qemu_conf = qemu_conf
        super().__init__(near, *options)
        try:
            self._lay_out(far=False)
            self.start_libvirtd(far=False)
        except BaseException:
            self.close()
            raise

    def boot(self) -> None:
        """See `Hosts`; libvirtd too."""
        super().boot()
        self._lay_out(far=True)
        self.start_libvirtd(far=True)

    def start_libvirtd(self, *, far: bool) -> None:
        """Start it, and wait until it answers."""
        enter = self.enter_far if far else self.enter
        daemon = subprocess.Popen([*TIED, *enter, "libvirtd", "--listen"], stdin=subprocess.DEVNULL)
        self._daemons[far] = daemon

        def answers() -> bool:
            if daemon.poll() is not None:
                raise LabError(f"libvirtd ended: {self._log(far=far).read_text()[-2000:]}")
            with contextlib.suppress(LabError):
                self.virsh("version", far=far)
                return True
            return False

        wait_until(answers, "libvirtd", 20)

    def revive(self) -> None:
        """Start a libvirtd again that has crashed, and end what it ran: the next test is not to fail for that.

        9.0 was seen to, in a test with a backup: its monitor's message was gone while a thread waited for the answer.
        """
        for far, daemon in list(self._daemons.items()):
            if _has_ended(daemon):
                daemon.wait(20)
                self.start_libvirtd(far=far)
                for name, state in self.domains(far=far).items():
                    if state != "shut off":
                        self.virsh("destroy", name, far=far)

    def libvirtd(self, *, far: bool) -> list[int]:
        """Its process."""
        return _of_daemon(self._daemons[far].pid)

    def stop_libvirtd(self, *, far: bool) -> None:
        """Kill it; the QEMUs that it started go on."""
        daemon = self._daemons.pop(far)
        for pid in _of_daemon(daemon.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        daemon.wait(20)

    def virsh(self, *words: object, far: bool = False) -> str:
        """What virsh prints, on hosta's libvirt, or hostb's."""
        return self.run("virsh", "-q", *words, far=far)

    def domains(self, *, far: bool = False) -> dict[str, str]:
        """State by name of all domains of a host, such as running, paused, "shut off"."""
        listed = re.findall(r"^\s*\S+\s+(\S+)\s+(.+?)\s*$", self.virsh("list", "--all", far=far), re.MULTILINE)
        return dict(listed)

    def close(self) -> None:
        """End both hosts with their libvirtds and guests."""
        for far in (False, True):
            if far in self._daemons:
                with contextlib.suppress(LabError, subprocess.TimeoutExpired):
                    for name in self.domains(far=far):
                        with contextlib.suppress(LabError):
                            self.virsh("destroy", name, far=far)
        for far in list(self._daemons):
            self.stop_libvirtd(far=far)
        super().close()

    def power_off(self) -> None:
        """See `Hosts`."""
        super().power_off()
        if (daemon := self._daemons.pop(True, None)) is not None:
            daemon.wait(20)

    def _lay_out(self, *, far: bool) -> None:
        base = (self.far if far else self.near) / "libvirt"
        fresh = not base.exists()
        for name in _PRIVATE:
            (base / name).mkdir(parents=True, exist_ok=True)
        if fresh:
            conf = _LIBVIRTD_CONF.format(uuid=uuid.uuid4(), log=self._log(far=far))
            (base / "etc/libvirtd.conf").write_text(conf)
            (base / "etc/qemu.conf").write_text(self._qemu_conf)
        for name, place in _PRIVATE.items():
            self.run("mkdir", "-p", place, far=far)
            self.run("mount", "--bind", base / name, place, far=far)
        if Path("/dev/kvm").exists():
            # Slow here, and where QEMU's user may not use it, but root may, libvirt probes anew for every call.
            nobodys = base / "kvm"
            nobodys.touch(mode=0)
            self.run("mount", "--bind", nobodys, "/dev/kvm", far=far)
            self.run("mount", "-o", "remount,bind,ro", "/dev/kvm", far=far)

    def _log(self, *, far: bool) -> Path:
        return (self.far if far else self.near) / "libvirt" / "libvirtd.log"


def _of_daemon(pid: int) -> list[int]:
    """The process, or what it runs in its stead in another PID namespace, with whose end it ends, too."""
    with contextlib.suppress(OSError):
        if Path(f"/proc/{pid}/comm").read_text().strip() == "nsenter":
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [*map(int, children)] or [pid]
    return [pid]


def _has_ended(daemon: subprocess.Popen[bytes]) -> bool:
    """Whether it has, though whatever started it may not have heard of it yet."""
    if daemon.poll() is not None:
        return True
    with contextlib.suppress(OSError):
        return not any(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in _of_daemon(daemon.pid))
    return True


def domain_xml(name: str, disks: Sequence[Disk], orders: Orders, kernel: Kernel, initramfs: Path, console: Path) -> str:
    """A small emulated guest that boots the laboratory's kernel; its console goes to the file `console`.

    libvirt rounds memory to MiB, so that QEMU gets it past it (see `odd_memory`).
    """
    words = escape(orders.command_line())
    devices = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='{disk.format}'/><source file='{disk.path}'/>"
        f"<target dev='vd{chr(97 + number)}' bus='virtio'/>{'<readonly/>' if disk.read_only else ''}</disk>"
        for number, disk in enumerate(disks)
    )
    return f"""
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>160</memory>
  <vcpu>1</vcpu>
  <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <kernel>{kernel.image}</kernel><initrd>{initramfs}</initrd><cmdline>{words}</cmdline>
  </os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {devices}
    <serial type='file'><source path='{console}'/></serial>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-object'/><qemu:arg value='memory-backend-ram,id=odd,size={odd_memory(160)}'/>
    <qemu:arg value='-machine'/><qemu:arg value='memory-backend=odd'/>
    <qemu:arg value='-m'/><qemu:arg value='size={odd_memory(160) >> 10}k'/>
  </qemu:commandline>
</domain>
"""


@contextlib.contextmanager
def two_virt_hosts(
    *options: str, qemu_conf: str = PLAIN, directory: Path = Path("/tmp")
) -> Iterator[VirtHosts]:  # fmt: skip
    """hosta and hostb with libvirt, in a folder of their own in `directory`, which is removed in the end."""
    near = Path(tempfile.mkdtemp(prefix="virt-", dir=directory))
    try:
        hosts = VirtHosts(near, *options, qemu_conf=qemu_conf)
        try:
            yield hosts
        finally:
            hosts.close()
    finally:
        shutil.rmtree(near)


def main(command: Sequence[str]) -> int:
    """Run `command`, or a shell, in hosta."""
    with two_virt_hosts() as hosts:
        print(f"hosta's folder: {hosts.near}; hostb's: {hosts.far}")
        print(f"from here:      virsh list; virsh -c qemu+ssh://hostb:{PORT}/system list")
        print(f"into hostb:     {shlex.join(hosts.enter_far)} bash", flush=True)
        shell = os.environ.get("SHELL", "sh")
        return subprocess.run([*hosts.enter, *(command or [shell])], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
