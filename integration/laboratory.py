"""The laboratory that the manual uses: two hosts (`integration.hosts`) with /srv/vm each, and guests on demand.

    python -m integration.laboratory                     a shell in hosta, as `make lab` gives it; root only
    python -m integration.laboratory 'COMMAND; ...'      bash runs that in hosta instead

In it `lab` (`integration.labguest`) makes guests, `ssh hostb` leads to the other host, and `qemu-blkmig` is this
checkout's. All ends with the shell, and nothing of it stays.
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
from qemu_blkmig.demo.guest import build_initramfs, find_kernel

VM = "/srv/vm"
"""On each host: where its guests' images are."""
_GREETING = f"""\
This is hosta; `ssh hostb` leads to the other host. {VM} is for images, on each host its own.
`lab guest web` boots a guest that writes all the time, `lab look web` tells how it is. Leave with `exit`.
"""


class Laboratory:
    """Two hosts, furnished; `environment` is for commands that run in hosta behind `hosts.enter`."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self._state = hosts.near / "state"
        kernel = find_kernel()
        build_initramfs(hosts.near / "initramfs", kernel)
        for far, folder in ((False, hosts.near), (True, hosts.far)):
            for name in ("vm", "bin"):
                (folder / name).mkdir(exist_ok=True)
            self._write_tools(folder / "bin")
            script = f"mount -t tmpfs tmpfs /srv; mkdir {VM} /srv/lab; mount --bind {folder / 'vm'} {VM}"
            hosts.run("sh", "-ec", script, far=far)
        # The same guest boots on both hosts, from a kernel and initramfs that each has.
        (hosts.far / "initramfs").write_bytes((hosts.near / "initramfs").read_bytes())
        for far, folder in ((False, hosts.near), (True, hosts.far)):
            for name, path in (("initramfs", folder / "initramfs"), ("vmlinuz", kernel.image)):
                hosts.run("ln", "-s", path, f"/srv/lab/{name}", far=far)
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
            "PS1": r"\h:\w# ",
        }

    def run(self, command: Sequence[str], **options: object) -> int:
        """Run a command in hosta's /srv/vm; its exit code."""
        full = [*self.hosts.enter, "env", "-C", VM, *command]
        return subprocess.run(full, env=self.environment, check=False, **options).returncode  # type: ignore[call-overload, no-any-return]

    def _write_tools(self, folder: Path) -> None:
        for name, module in (("qemu-blkmig", "qemu_blkmig"), ("lab", "integration.labguest")):
            (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
            (folder / name).chmod(0o755)


@contextlib.contextmanager
def laboratory() -> Iterator[Laboratory]:
    """A laboratory; all that was started in it ends with it, and its folder is removed."""
    near = Path(tempfile.mkdtemp(prefix="manual-", dir="/tmp"))
    try:
        # scp needs it.
        hosts = Hosts(near, "Subsystem sftp internal-sftp")
        try:
            made = Laboratory(hosts)
            try:
                yield made
            finally:
                made.run(["lab", "end", "--all"])
        finally:
            hosts.close()
    finally:
        shutil.rmtree(near)


def main(script: Sequence[str]) -> int:
    """Run a script, or a shell, in hosta."""
    with laboratory() as made:
        if script:
            return made.run(["bash", "-ec", *script])
        print(_GREETING, flush=True)
        return made.run(["bash", "--norc", "-i"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
