"""The laboratory that the manual uses: two hosts (`integration.virthosts`) with /srv/vm each, and guests on demand.

    python -m integration.laboratory                     a shell in hosta, as `make lab` gives it; root only
    python -m integration.laboratory 'COMMAND; ...'      bash runs that in hosta instead

In it `lab` (`integration.labguest`) makes guests, `ssh hostb` leads to the other host, each host has a libvirt, and
`qemu-blkmig` is this checkout's. All ends with the shell, and nothing of it stays.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from integration.hosts import PORT, REPOSITORY, Hosts
from integration.lab import wait_until
from integration.unpacked import unpacked
from integration.virthosts import VirtHosts
from qemu_blkmig.demo.guest import build_initramfs, find_kernel

VM = "/srv/vm"
"""On each host: where its guests' images are."""
_OURS = {
    "qemu-blkmig": "qemu_blkmig",
    "virsh-blkmigrate": "qemu_blkmig.cli.virsh_blkmigrate",
    "lab": "integration.labguest",
}
_GREETING = f"""\
This is hosta; `ssh hostb` leads to the other host. {VM} is for images, on each host its own.
`lab guest web` boots a guest that writes all the time, `lab look web` tells how it is; `lab domain web1` has libvirt
boot one. Leave with `exit`.
"""


class Laboratory:
    """Two hosts, furnished; `environment` is for commands that run in hosta behind `hosts.enter`."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self._state = hosts.near / "state"
        kernel = unpacked(find_kernel(), hosts.near / "vmlinux")
        build_initramfs(hosts.near / "initramfs", kernel)
        for far, folder in ((False, hosts.near), (True, hosts.far)):
            for name in ("vm", "bin"):
                (folder / name).mkdir(exist_ok=True)
            self._write_tools(folder / "bin")
            script = f"mount -t tmpfs tmpfs /srv; mkdir {VM} /srv/lab; mount --bind {folder / 'vm'} {VM}"
            # On a terminal virsh would start it, and complain with each command that there is no polkit.
            script += "; [ ! -e /usr/bin/pkttyagent ] || mount --bind /dev/null /usr/bin/pkttyagent"
            hosts.run("sh", "-ec", script, far=far)
        # The same guest boots on both hosts, from a kernel and initramfs that each has.
        for name, path in (("initramfs", hosts.near / "initramfs"), ("vmlinuz", kernel.image)):
            shutil.copyfile(path, hosts.far / name)
            for far, here in ((False, path), (True, hosts.far / name)):
                hosts.run("ln", "-s", here, f"/srv/lab/{name}", far=far)
        hosts.run("ln", "-s", REPOSITORY / "ansible", "/srv/lab/ansible")
        hosts.run("ln", "-s", hosts.far / "etc" / "authorized_keys", "/srv/lab/authorized_keys", far=True)
        with (hosts.near / "ssh" / "ssh_config").open("a") as config:
            config.write(f"    Port {PORT}\n")
        key = (hosts.near / "ssh" / "key.pub").read_text()
        (hosts.near / "vm" / "key.pub").write_text(key)

    @property
    def environment(self) -> dict[str, str]:
        """hosta's."""
        return {
            **os.environ,
            "PATH": f"{self.hosts.near / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(REPOSITORY),
            "QEMU_BLKMIG_STATE_DIR": str(self._state),
            "TMPDIR": "/tmp",
            # Nothing of Ansible's is kept at home, no connection behind a run; a busy machine may take its time.
            "ANSIBLE_HOME": str(self.hosts.near / "ansible"),
            "ANSIBLE_ASYNC_DIR": str(self.hosts.near / "ansible" / "async"),
            "ANSIBLE_TIMEOUT": "100",
            "ANSIBLE_SSH_ARGS": "-o ControlMaster=no",
            "PS1": r"\h:\w# ",
        }

    def run(self, command: Sequence[str], **options: object) -> int:
        """Run a command in hosta's /srv/vm; its exit code."""
        full = [*self.hosts.enter, "env", "-C", VM, *command]
        return subprocess.run(full, env=self.environment, check=False, **options).returncode  # type: ignore[call-overload, no-any-return]

    def progress(self) -> list[Path]:
        """What was written on hosta to files of that name, by commands in the background."""
        return sorted((self.hosts.near / "vm").glob("*.progress"))

    def _write_tools(self, folder: Path) -> None:
        for name, module in _OURS.items():
            _write_script(folder / name, f"{sys.executable} -m {module}")
        for name in ("ansible", "ansible-doc", "ansible-galaxy", "ansible-playbook"):
            _write_script(folder / name, str(Path(sys.executable).parent / name))


def _write_script(path: Path, command: str) -> None:
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)


@contextlib.contextmanager
def laboratory(*, libvirt: bool = True) -> Iterator[Laboratory]:
    """A laboratory, with or without `libvirt`; all that was started in it ends with it, and its folder is removed."""
    near = Path(tempfile.mkdtemp(prefix="manual-", dir="/tmp"))
    try:
        # scp needs it.
        hosts = (VirtHosts if libvirt else Hosts)(near, "Subsystem sftp internal-sftp")
        try:
            made = Laboratory(hosts)
            try:
                yield made
            finally:
                made.run(["lab", "end", "--all"])
        finally:
            hosts.close()
    finally:
        # A process that Ansible left in the background on hosta may still write there.
        wait_until(lambda: _removed(near), "the laboratory's folder to be gone", 30)


def _removed(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def main(script: Sequence[str]) -> int:
    """Run a script, or a shell, in hosta."""
    with laboratory() as made:
        if script:
            return made.run(["bash", "-ec", *script])
        print(_GREETING, flush=True)
        return made.run(["bash", "--norc", "-i"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
