"""Two "hosts" on this machine, hosta and hostb: namespaces, joined by a network of their own; hostb has a real sshd.

    python -m integration.hosts              # a shell in hosta; `ssh hostb` works there

hosta has a network, a host name, /run and an ssh configuration of its own; hostb also its own processes, boot id and
sshd, and neither sees the other's folder. Processes of hostb have other numbers outside than inside. All of it ends
with the process that made it. Root only.

hostb can be another system: $BLKMIG_HOSTB names a folder with one, furnished by `scripts/matrix`, whose programs and
files hostb then has, but for /boot, temporary files, the checkout, and what the kernel shows.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from integration.lab import MARK_VARIABLE, LabError, wait_until
from integration.processes import command_line, sharing

REPOSITORY = Path(__file__).parent.parent
PORT = 2222
"""Of hostb's sshd; hosta's ssh configuration does not tell it, so that URLs must."""
ADDRESSES = {"hosta": "10.77.0.1", "hostb": "10.77.0.2"}

SYSTEM_B = os.environ.get("BLKMIG_HOSTB")
"""The folder with hostb's system; None: this one's."""
PYTHON_B = sys.executable if SYSTEM_B is None else "/src/.venv/bin/python"
"""Runs this checkout in hostb."""

_ENTER_SYSTEM = """
set -e
mount --bind {system} {system}
for path in /proc /dev /sys /boot /tmp /var/tmp; do
    mount --rbind $path {system}$path
done
mkdir -p {system}{repository}
mount --bind -o ro {repository} {system}{repository}
cd {system}
pivot_root . mnt
umount -l /mnt
"""
# `wait` in the first process of a PID namespace also reaps what is orphaned there.
_BOOT_A = """
set -e
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs {far}
mount --bind {near}/ssh/ssh_config /etc/ssh/ssh_config
mount --bind {near}/ssh/hosts /etc/hosts
hostname hosta
ip link set lo up
echo up > {near}/ssh/up
exec sleep infinity
"""
_BOOT_B = """
set -e
mount --bind {far}/etc/boot_id /proc/sys/kernel/random/boot_id
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd /run/far
mount --bind {far} /run/far
mount -t tmpfs tmpfs {near}
mkdir {far}
mount --move /run/far {far}
if [ -e {home}/.bashrc ]; then mount --bind {far}/etc/bashrc {home}/.bashrc; fi
hostname hostb
ip link set lo up
echo up > {far}/etc/up
sleep infinity &
wait
"""
_SSHD_CONFIG = """
Port {port}
PidFile none
HostKey {far}/etc/host_key
AuthorizedKeysFile {far}/etc/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
LogLevel VERBOSE
MaxStartups 50
SetEnv {environment}
"""
_SSH_CONFIG = """
Host hostb
    HostName {address}
    IdentityFile {near}/ssh/key
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile {near}/ssh/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
"""


class Hosts:
    """hosta and hostb, up with the network and sshd; `near` and `far` are their folders, `far` lies in `near`.

    `options`: more lines for sshd's configuration. `enter` and `enter_far` are put before a command to run it in
    hosta or in hostb. Raises `LabError` where it does not work.
    """

    def __init__(self, near: Path, *options: str) -> None:
        if os.geteuid() != 0:
            raise LabError("two hosts can only be made by root")
        self.near = near
        self.far = near / "hostb"
        self._options = options
        self._etc = self.far / "etc"
        self._ssh = near / "ssh"
        for folder in (self._etc, self._ssh, self.far / "bin", self.far / "tmp", self.far / "target"):
            folder.mkdir(parents=True)
        self._make_keys()
        self._write_tool()
        self.bashrc.touch()
        self._a = self._b = self._sshd = None  # type: subprocess.Popen[bytes] | None
        try:
            self._boot_a()
            self.boot()
        except BaseException:
            self.close()
            raise

    @property
    def enter(self) -> tuple[str, ...]:
        """Before a command that is to run in hosta; its process is the command's own."""
        return ("nsenter", "-t", str(_pid(self._a)), "-n", "-m", "-u", f"--wd={REPOSITORY}", "--")

    @property
    def enter_far(self) -> tuple[str, ...]:
        """Before a command that is to run in hostb, not by ssh."""
        return ("nsenter", "-t", str(self._init()), "-n", "-m", "-u", "-p", "-i", "--")

    @property
    def root_a(self) -> Path:
        """The file system as hosta sees it."""
        return Path(f"/proc/{_pid(self._a)}/root")

    @property
    def root_b(self) -> Path:
        """The file system as hostb sees it."""
        return Path(f"/proc/{self._init()}/root")

    @property
    def sshd_pid(self) -> int:
        """The process whose descendants are hostb's sshd and all that is run by it."""
        return _pid(self._sshd)

    @property
    def sshd_log(self) -> Path:
        """What sshd told."""
        return self._etc / "sshd.log"

    @property
    def log(self) -> str:
        """What sshd told so far."""
        return self.sshd_log.read_text(errors="replace") if self.sshd_log.exists() else ""

    def run(self, *command: object, far: bool = False) -> str:
        """Run a command in hosta, or in hostb; what it prints. Raises `LabError` where it fails."""
        full = [*(self.enter_far if far else self.enter), *map(str, command)]
        done = subprocess.run(full, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise LabError(f"{shlex.join(map(str, command))}: {done.stdout}{done.stderr}")
        return done.stdout

    def boot(self) -> None:
        """Start hostb with a new boot id and nothing in its folder for temporary files, connect it, start its sshd."""
        shutil.rmtree(self.far / "tmp")
        (self.far / "tmp").mkdir()
        (self._etc / "boot_id").write_text(f"{uuid.uuid4()}\n")
        (self._etc / "up").unlink(missing_ok=True)
        kinds = ["--fork", "--pid", "--mount-proc", "--kill-child=KILL", "--net", "--mount", "--uts", "--ipc"]
        self._b = self._start(kinds, _BOOT_B if SYSTEM_B is None else _ENTER_SYSTEM + _BOOT_B)
        self._wait_up(self._etc / "up", self._b)
        for host in ("hosta", "hostb"):
            with contextlib.suppress(LabError):
                self.run("ip", "link", "del", "net0", far=host == "hostb")
        self.run("ip", "link", "add", "net0", "type", "veth", "peer", "name", "net0", "netns", self._init())
        for host, address in ADDRESSES.items():
            self.run("ip", "address", "add", f"{address}/24", "dev", "net0", far=host == "hostb")
            self.run("ip", "link", "set", "net0", "up", far=host == "hostb")
        self.start_sshd(*self._options)

    @property
    def is_up(self) -> bool:
        """Whether hostb runs."""
        return self._b is not None

    def power_off(self) -> None:
        """End all processes of hostb at once, and with them its /run and its end of the network. Its disk stays."""
        if self._b is not None:
            # The first process, not its parent, which waits for it: what init is left with it may reap late.
            for pid in children(self._b.pid) or [self._b.pid]:
                os.kill(pid, signal.SIGKILL)
        for process in (self._b, self._sshd):
            if process is not None:
                process.wait(30)
        self._sshd = self._b = None

    def reboot(self) -> None:
        """`power_off`, then `boot`."""
        self.power_off()
        self.boot()

    def start_sshd(self, *options: str) -> None:
        """(Re)start hostb's sshd; connections that are open stay. `options`: lines for its configuration."""
        if self._sshd is not None:
            # It is inside another PID namespace than nsenter, which waits for it.
            for pid in children(self._sshd.pid):
                os.kill(pid, signal.SIGTERM)
            self._sshd.wait()
        # The first line that names an option counts.
        config = "\n".join(options) + _SSHD_CONFIG.format(
            port=PORT, far=self.far, environment=" ".join(f'"{name}={text}"' for name, text in self._environment())
        )
        (self._etc / "sshd_config").write_text(config)
        said = len(self.log)
        command = ["/usr/sbin/sshd", "-D", "-f", str(self._etc / "sshd_config"), "-E", str(self.sshd_log)]
        self._sshd = subprocess.Popen([*TIED, *self.enter_far, *command], env=plain_environment())
        listening = f"Server listening on 0.0.0.0 port {PORT}"
        wait_until(lambda: listening in self.log[said:], "sshd", 10, lambda: self.log)

    def authorize(self, options: str = "") -> None:
        """Accept hosta's key; `options` stand before it, as in authorized_keys(5)."""
        key = (self._ssh / "key.pub").read_text()
        (self._etc / "authorized_keys").write_text(f"{options} {key}".lstrip())

    def change_host_key(self) -> None:
        """Give hostb another host key than hosta knows; for connections that are made from now on."""
        self._make_host_key()
        self.start_sshd(*self._options)

    def reset(self) -> None:
        """Reboot hostb as it was at first: its keys accepted and known, its shell silent."""
        self.authorize()
        self._trust()
        self.bashrc.write_text("")
        self.reboot()

    def processes(self) -> list[int]:
        """Everything that runs in hostb, by the numbers that it has outside."""
        if self._b is None:
            return []
        return sharing(self._init(), "pid")

    def near_processes(self) -> list[int]:
        """Everything that runs in hosta, which has its network."""
        return sharing(_pid(self._a), "net")

    def connections(self) -> list[int]:
        """The sshd processes that each serve one connection."""
        return [pid for pid in self.processes() if re.match(r"sshd(-session)?: (?!.*\[listener\])", command_line(pid))]

    def outside(self, pid: int) -> int:
        """The number outside of hostb's process `pid`. Raises `LabError` if it is not there."""
        for candidate in self.processes():
            with contextlib.suppress(OSError):
                numbers = re.search(r"^NSpid:(.*)$", Path(f"/proc/{candidate}/status").read_text(), re.MULTILINE)
                if numbers and int(numbers[1].split()[-1]) == pid:
                    return candidate
        raise LabError(f"hostb has no process {pid}")

    def close(self) -> None:
        """End both hosts and all that runs in hostb. The folders stay."""
        self.power_off()
        if self._a is not None:
            self._a.kill()
            self._a.wait()
            self._a = None

    def _init(self) -> int:
        return children(_pid(self._b))[0]

    def _boot_a(self) -> None:
        self._a = self._start(["--net", "--mount", "--uts"], _BOOT_A)
        self._wait_up(self._ssh / "up", self._a)

    def _start(self, namespaces: list[str], script: str) -> subprocess.Popen[bytes]:
        places = {"near": self.near, "far": self.far, "home": Path.home(), "system": SYSTEM_B, "repository": REPOSITORY}
        shell = ["sh", "-c", script.format(**places)]
        command = [*TIED, "unshare", *namespaces, "--", *shell]
        with (self.near / "boot.log").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, env=plain_environment())

    def _wait_up(self, mark: Path, process: subprocess.Popen[bytes]) -> None:
        def up() -> bool:
            if process.poll() is not None:
                raise LabError((self.near / "boot.log").read_text())
            return mark.exists()

        wait_until(up, "a host to boot", 20)

    def _make_keys(self) -> None:
        _make_key(self._ssh / "key")
        self._make_host_key()
        self._trust()
        self.authorize()
        config = _SSH_CONFIG.format(address=ADDRESSES["hostb"], near=self.near)
        (self._ssh / "ssh_config").write_text(config)
        names = "".join(f"{address} {host}\n" for host, address in ADDRESSES.items())
        (self._ssh / "hosts").write_text(f"127.0.0.1 localhost\n{names}")

    def _make_host_key(self) -> None:
        for name in ("host_key", "host_key.pub"):
            (self._etc / name).unlink(missing_ok=True)
        _make_key(self._etc / "host_key")

    def _trust(self) -> None:
        host_key = (self._etc / "host_key.pub").read_text()
        (self._ssh / "known_hosts").write_text(f"[{ADDRESSES['hostb']}]:{PORT} {host_key}")

    def _write_tool(self) -> None:
        self.tool.write_text(f'#!/bin/sh\nexec {PYTHON_B} -m qemu_blkmig "$@"\n')
        self.tool.chmod(0o755)

    @property
    def tool(self) -> Path:
        """qemu-blkmig as it is found in hostb's PATH."""
        return self.far / "bin" / "qemu-blkmig"

    @property
    def bashrc(self) -> Path:
        """What bash runs first in hostb, also for a command by ssh."""
        return self._etc / "bashrc"

    def _environment(self) -> Iterator[tuple[str, str]]:
        yield "PATH", f"{self.far / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        yield "PYTHONPATH", str(REPOSITORY)
        yield "TMPDIR", str(self.far / "tmp")
        yield "QEMU_BLKMIG_STATE_DIR", str(self.far / "state")
        if MARK_VARIABLE in os.environ:
            yield MARK_VARIABLE, os.environ[MARK_VARIABLE]


TIED = ("setpriv", "--pdeathsig", "KILL", "--")
"""A process that ends with the one that started it, however that ends."""


def plain_environment() -> dict[str, str]:
    """For the hosts' own processes, which are no leftovers of a test."""
    return {name: text for name, text in os.environ.items() if name != MARK_VARIABLE}


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", path], check=True)


def _pid(process: subprocess.Popen[bytes] | None) -> int:
    if process is None:
        raise LabError("the host is down")
    return process.pid


def children(pid: int) -> list[int]:
    """Processes that it has started and that are there."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@contextlib.contextmanager
def two_hosts(*options: str, directory: Path = Path("/tmp")) -> Iterator[Hosts]:
    """hosta and hostb in a folder of their own in `directory`, which is removed in the end."""
    near = Path(tempfile.mkdtemp(prefix="hosts-", dir=directory))
    try:
        hosts = Hosts(near, *options)
        try:
            yield hosts
        finally:
            hosts.close()
    finally:
        shutil.rmtree(near)


def main(command: Sequence[str]) -> int:
    """Run `command`, or a shell, in hosta."""
    with two_hosts() as hosts:
        print(f"hosta's folder: {hosts.near}; hostb's: {hosts.far}; sshd's log: {hosts.sshd_log}")
        print(f"from here:      ssh -p {PORT} hostb; a destination: ssh://hostb:{PORT}{hosts.far}/target")
        print(f"into hosta:     {shlex.join(hosts.enter)} bash")
        print(f"into hostb:     {shlex.join(hosts.enter_far)} bash", flush=True)
        shell = os.environ.get("SHELL", "sh")
        return subprocess.run([*hosts.enter, *(command or [shell])], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
