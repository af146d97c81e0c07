"""The laboratory of the integration tests: disks, real guests, and the judges of what a migration left behind.

Nothing here uses qemu_blkmig's own QMP or migration code: what judges must not share the defects of what it judges.
Tests get a `Lab` from the fixture `lab` (conftest.py); it ends everything that was started in the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import pytest

from integration.processes import command_line
from qemu_blkmig.demo.guest import Kernel, Orders, boot_arguments, odd_memory
from qemu_blkmig.demo.records import RecordsReport, check

Format = Literal["raw", "qcow2"]
Machine = Literal["q35", "pc"]
Style = Literal["drive", "blockdev"]

QEMU_VARIABLE = "QEMU_BLKMIG_TEST_QEMU"
MARK_VARIABLE = "QEMU_BLKMIG_TEST_MARK"
BOOT_SECONDS = 90.0
"""How long a guest may take to its first record; two or three seconds on an idle machine."""


class LabError(Exception):
    """The laboratory itself failed: QEMU did not start, the guest does not write, a monitor does not answer."""


class QmpError(LabError):
    """QEMU refused a command."""


@dataclass(frozen=True, slots=True)
class Disk:
    """An image and how a guest sees it; `size` is the virtual size in bytes, `iothread` gives it one of its own."""

    path: Path
    format: Format
    size: int
    bus: Literal["virtio", "scsi"] = "virtio"
    read_only: bool = False
    iothread: bool = False


@dataclass(frozen=True, slots=True)
class Hardware:
    """The guest around its disks. `style`: how the images are given to QEMU. `extra`: more arguments of QEMU.

    `memory`: MiB. `cdrom`: an image in a CD-ROM drive; `empty_drive`: a CD-ROM drive with nothing in it.
    """

    machine: Machine = "q35"
    style: Style = "blockdev"
    memory: int = 160
    cdrom: Path | None = None
    empty_drive: bool = False
    extra: Sequence[str] = ()


class Qmp:
    """A plain, blocking QMP client on a unix socket; events are collected while it waits for answers."""

    def __init__(self, path: Path, timeout: float = 20.0) -> None:
        self.events: list[dict[str, Any]] = []
        self._path = path
        self._timeout = timeout
        self._socket = _connect(path, timeout)
        self._lines = self._socket.makefile("rb")
        self._read()
        self.execute("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the socket for the next client."""
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """What `command` returns. Raises `QmpError` when QEMU refuses it."""
        message = {"execute": command, "arguments": arguments or {}}
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise LabError(f"{self._path}: {error}") from error
        while True:
            answer = self._read()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def wait_event(self, name: str, timeout: float = 60.0) -> dict[str, Any]:
        """The next event `name`, also one that came before; it is taken out of `events`."""
        found: list[dict[str, Any]] = []

        def arrived() -> bool:
            self.execute("query-status")
            found.extend(event for event in self.events if event["event"] == name)
            return bool(found)

        wait_until(arrived, f"event {name}", timeout)
        self.events.remove(found[0])
        return found[0]

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except OSError as error:
            raise LabError(f"{self._path} does not answer: {error}") from error
        if not line:
            raise LabError(f"{self._path}: QEMU closed the connection")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(slots=True)
class Guest:
    """A guest of the laboratory: one it started itself, or the destination that a migration launches.

    `directory` holds its sockets and its console; `launched`: by the tool under test. `far`: the folder on another host
    where its destination is to have that; `outside` tells the number here of a process of the host where it runs.
    """

    directory: Path
    disks: tuple[Disk, ...]
    hardware: Hardware
    orders: Orders
    initramfs: Path
    kernel: Kernel
    launched: bool = False
    process: subprocess.Popen[bytes] | None = None
    far: Path | None = None
    outside: Callable[[int], int] = int
    _control: Qmp | None = field(default=None, repr=False)

    @property
    def qmp(self) -> Path:
        """The QMP socket for the tool under test; a launched guest has none: the tool brings its own."""
        return self.directory / "qmp"

    @property
    def monitor(self) -> Path:
        """A second QMP socket, for the tests."""
        return self.directory / "monitor"

    @property
    def agent(self) -> Path:
        """The guest agent's socket, if the guest's orders are to run one."""
        return self.directory / "agent"

    @property
    def serial(self) -> Path:
        """What the guest prints goes here."""
        return self.directory / "console"

    @property
    def pid_file(self) -> Path:
        """Written by QEMU."""
        return self.directory / "pid"

    @property
    def pid(self) -> int:
        """The process of its QEMU. Raises `LabError` if there never was one."""
        if self.process is not None:
            return self.process.pid
        try:
            return self.outside(int(self.pid_file.read_text()))
        except (FileNotFoundError, ValueError) as error:
            raise LabError(f"{self.directory}: QEMU was not started") from error

    def running(self) -> bool:
        """Whether its QEMU is there (paused or not)."""
        if self.process is not None:
            return self.process.poll() is None
        with contextlib.suppress(LabError):
            return _alive(self.pid)
        return False

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a QMP command on the tests' own monitor, which stays connected while it answers."""
        if self._control is None:
            self._control = Qmp(self.monitor)
        try:
            return self._control.execute(command, arguments)
        except QmpError:
            raise
        except LabError:
            # It may be another QEMU's by now.
            self._control.close()
            self._control = None
            raise

    @property
    def control(self) -> Qmp:
        """The connection to the tests' own monitor, for its events."""
        self.execute("query-status")
        if self._control is None:
            raise LabError("not connected")
        return self._control

    def status(self) -> str:
        """QEMU's run state: running, paused, inmigrate, postmigrate..."""
        return str(self.execute("query-status")["status"])

    def pause(self) -> None:
        """Stop the vCPUs; QEMU has then drained and flushed the guest's writes."""
        self.execute("stop")

    def resume(self) -> None:
        """Let the vCPUs go on."""
        self.execute("cont")

    def press_sysrq(self, key: str) -> None:
        """Press Alt-SysRq and a letter: c crashes the guest, o powers it off, b resets it."""
        keys = [{"type": "qcode", "data": code} for code in ("alt", "sysrq", key)]
        self.execute("send-key", {"keys": keys})

    def console(self) -> str:
        """What the guest has printed so far."""
        return self.serial.read_text(errors="replace") if self.serial.exists() else ""

    def acked(self, disk: str | None = None) -> int:
        """The largest record number that the guest has said is written: on `disk` (vda), or on whichever is ahead."""
        return max((number for number, _ in self._acks(disk)), default=0)

    def longest_gap(self, disk: str | None = None) -> float:
        """Seconds of the longest time between two completed writes that the guest has told so far.

        A pause of the guest counts in it some two seconds of running after it ended.
        """
        return max((gap for _, gap in self._acks(disk)), default=0) / 1e6

    def _acks(self, disk: str | None) -> list[tuple[int, int]]:
        name = re.escape(disk) if disk else r"\w+"
        found = re.findall(rf"^blkmig ack {name} seq (\d+) gap_us (\d+)\r?$", self.console(), re.MULTILINE)
        return [(int(number), int(gap)) for number, gap in found]

    def writers(self) -> int:
        """How many disks have acknowledged a record."""
        return len(set(re.findall(r"^blkmig ack (\w+) seq", self.console(), re.MULTILINE)))

    def wait_for_writing(self, *, more: int = 1, timeout: float = BOOT_SECONDS) -> int:
        """Wait until the guest has acknowledged `more` further records; all its writers have started then. The number.

        Raises `LabError` with what the guest printed if it does not come to that.
        """
        start = self.acked()
        expected = 1 if self.orders.agent else len(self.orders.disks) or sum(not disk.read_only for disk in self.disks)

        def writes() -> bool:
            if not self.running():
                raise LabError(f"QEMU ended: {self.complaint()}\n{self.console()[-2000:]}")
            return self.acked() >= start + more and self.writers() >= expected

        wait_until(writes, f"record {start + more} of the guest", timeout, lambda: self.console()[-2000:])
        return self.acked()

    def complaint(self) -> str:
        """What its QEMU wrote to stderr, where the laboratory started it."""
        errors = self.directory / "stderr"
        return errors.read_text(errors="replace") if errors.exists() else ""

    def quit(self) -> None:
        """Make QEMU quit in an orderly way, and see it gone."""
        with contextlib.suppress(LabError):
            self.execute("quit")
        self._see_gone(20.0)

    def kill(self) -> None:
        """SIGKILL its QEMU, and see it gone."""
        with contextlib.suppress(ProcessLookupError, LabError):
            if self.running():
                os.kill(self.pid, signal.SIGKILL)
        self._see_gone(20.0)

    def _see_gone(self, timeout: float) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        wait_until(lambda: not self.running(), f"the end of the QEMU of {self.directory}", timeout)

    def destination(self, directory: Path) -> Guest:
        """The guest that `launch_command(directory)` starts: its console, its tests' monitor and its images."""
        lab = (self.far or self.directory.parent) / (self.directory.name + "-destination")
        lab.mkdir(exist_ok=True)
        disks = tuple(disk if disk.read_only else replace(disk, path=directory / disk.path.name) for disk in self.disks)
        return replace(self, directory=lab, disks=disks, launched=True, process=None, _control=None)

    def launch_command(self, directory: Path) -> str:
        """For `migrate --launch`: this guest's QEMU with its writable images in `directory`.

        Read-only disks and CD-ROMs are not migrated: they stay where they are.
        """
        return shlex.join(self.destination(directory).arguments())

    def arguments(self) -> list[str]:
        """The command line of its QEMU."""
        prefix = shlex.split(os.environ.get(QEMU_VARIABLE, "qemu-system-x86_64"))
        base = ["-M", self.hardware.machine, "-accel", "tcg", "-cpu", "qemu64"]
        base += ["-m", f"{odd_memory(self.hardware.memory) >> 10}K"]
        base += ["-display", "none", "-nodefaults", "-no-user-config", "-pidfile", str(self.pid_file)]
        base += ["-serial", f"file:{self.serial}", *boot_arguments(self.kernel, self.initramfs, self.orders)]
        for path in (self.monitor,) if self.launched else (self.qmp, self.monitor):
            base += ["-qmp", f"unix:{path},server=on,wait=off"]
        if any(disk.bus == "scsi" for disk in self.disks):
            base += ["-device", "virtio-scsi-pci,id=scsi0"]
        for number, disk in enumerate(self.disks):
            base += _disk_arguments(disk, number, self.hardware.style)
        return [*prefix, *base, *_cdrom_arguments(self.hardware), *self._agent_arguments(), *self.hardware.extra]

    def _agent_arguments(self) -> list[str]:
        if not self.orders.agent:
            return []
        channel = f"socket,id=agent,path={self.agent},server=on,wait=off"
        port = "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"
        return ["-chardev", channel, "-device", "virtio-serial-pci", "-device", port]


class Lab:
    """What one test has at hand: a folder, disks, guests; and the judges.

    `directory` is short enough for unix sockets. `temporary` is $TMPDIR of everything started in the test, `state`
    its $QEMU_BLKMIG_STATE_DIR. `entering` is put before what is to run on the source's host.
    """

    entering: Sequence[str] = ()
    agent_words: Sequence[str] = ("qemu_blkmig.destination.agent",)
    """What the agent's command line holds."""

    def __init__(self, directory: Path, kernel: Kernel, initramfs: Callable[[bool], Path], mark: str) -> None:
        self.directory = directory
        self.temporary = directory / "tmp"
        self.state = directory / "state"
        self.target = directory / "target"
        for folder in (self.temporary, self.state, self.target):
            folder.mkdir()
        self.guests: list[Guest] = []
        self._kernel = kernel
        self._initramfs = initramfs
        self._mark = mark

    def disk(
        self,
        name: str,
        size: int,
        format: Format = "raw",
        *,
        data: Sequence[tuple[int, int]] = (),
        backing: Disk | None = None,
        options: Sequence[str] = (),
    ) -> Disk:
        """Create an image `name` with random bytes at the extents `data` (offset, length) and holes elsewhere.

        `options`: of `qemu-img create -o`, such as cluster_size=4096.
        """
        path = self.directory / name
        command = ["qemu-img", "create", "-q", "-f", format]
        if backing is not None:
            command += ["-b", str(backing.path), "-F", backing.format]
        if options:
            command += ["-o", ",".join(options)]
        _run([*command, str(path), str(size)])
        for offset, length in data:
            write_random(path, format, offset, length)
        return Disk(path, format, size)

    def boot(self, disks: Sequence[Disk], orders: Orders | None = None, hardware: Hardware | None = None) -> Guest:
        """Start a guest; it does not wait for it to write."""
        orders = orders or Orders(rate=100)
        directory = self.directory / f"guest{len(self.guests)}"
        directory.mkdir()
        initramfs = self._initramfs(orders.agent)
        guest = Guest(directory, tuple(disks), hardware or Hardware(), orders, initramfs, self._kernel)
        with (directory / "stderr").open("wb") as errors:
            command = [*self.entering, *guest.arguments()]
            guest.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        self.guests.append(guest)
        return guest

    def restart(self, guest: Guest) -> Guest:
        """Boot a guest whose QEMU has ended, with the same disks and sockets."""
        with (guest.directory / "stderr").open("ab") as errors:
            guest.process = subprocess.Popen(guest.arguments(), stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        return guest

    def destination(self, guest: Guest, directory: Path | None = None) -> Guest:
        """The guest that a migration of `guest` to `directory` (`target`) launches; it is ended with the test."""
        launched = guest.destination(directory or self.target)
        self.guests.append(launched)
        return launched

    def processes(self) -> list[int]:
        """Every process that was started in this test, also by a process that is dead, except the guests' QEMUs."""
        known = {guest.pid for guest in self.guests if guest.running()}
        return [pid for pid in _marked(self._mark) if pid not in known]

    def assert_no_leftovers(
        self,
        *guests: Guest,
        directories: Sequence[Path] = (),
        allow: Collection[int] = (),
        within: float = 15.0,
    ) -> None:
        """Assert that the tool left nothing: on the QEMUs of `guests` that still run, among the processes of this
        test (`allow`: those that may run), in `temporary` and `directories`; it may need `within` seconds for that.
        """
        found: list[str] = []

        def clean() -> bool:
            found[:] = [f"process {pid}: {command_line(pid) or 'gone'}" for pid in self.processes() if pid not in allow]
            found.extend(self.left_elsewhere())
            for guest in guests:
                found.extend(leftovers_in_qemu(guest))
            for directory in (self.temporary, *directories):
                found.extend(str(path) for path in directory.rglob("*blkmig-*"))
            return not found

        deadline = time.monotonic() + within
        while not clean() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not found, "left behind: " + "; ".join(found)

    def put_in_order(self) -> None:
        """Empty the folders, whatever a failed test left in them."""
        for folder in (self.target, self.state, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)

    def left_elsewhere(self) -> list[str]:
        """What is left on another host."""
        return []

    @property
    def place(self) -> str:
        """`target` as the command line names it."""
        return f"local:{self.target}"

    def close(self) -> None:
        """End every process that was started in the test."""
        for guest in self.guests:
            guest.kill()
        for pid in _marked(self._mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


AnyLab = TypeVar("AnyLab", bound=Lab)


@contextlib.contextmanager
def laboratory(kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[Lab]:
    """A laboratory in a folder of its own; all that was started in it ends with it.

    `initramfs(agent)`: where the guest's initramfs without or with the guest agent is.
    """
    with laid_out(Lab, kernel, initramfs) as lab:
        yield lab


@contextlib.contextmanager
def laid_out(kind: type[AnyLab], kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[AnyLab]:
    """See `laboratory`; of this kind."""
    mark = uuid.uuid4().hex
    directory = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv(MARK_VARIABLE, mark)
        lab = kind(directory, kernel, initramfs, mark)
        stack.callback(lab.close)
        patch.setenv("TMPDIR", str(lab.temporary))
        patch.setenv("QEMU_BLKMIG_STATE_DIR", str(lab.state))
        # tempfile remembers the folder that it found first.
        patch.setattr(tempfile, "tempdir", None)
        yield lab


def leftovers_in_qemu(guest: Guest) -> list[str]:
    """What of ours is in a QEMU: bitmaps, exports, nodes, jobs and objects named blkmig-, an NBD server, a throttle.

    QEMU cannot be asked whether it has an NBD server: that one can be started, and stopped again, tells.
    """
    if not guest.running():
        return []
    found: list[str] = []
    for node in guest.execute("query-named-block-nodes", {"flat": True}):
        names = [node["node-name"], *(bitmap.get("name", "") for bitmap in node.get("dirty-bitmaps", ()))]
        found += [f"node or bitmap {name}" for name in names if name.startswith("blkmig-")]
    for export in guest.execute("query-block-exports"):
        found.append(f"export {export['id']}")
    for listed, key in (("query-jobs", "id"), ("query-block-jobs", "device"), ("query-chardev", "label")):
        found += [f"{listed}: {one[key]}" for one in guest.execute(listed) if one[key].startswith("blkmig-")]
    objects = guest.execute("qom-list", {"path": "/objects"})
    found += [f"object {one['name']}" for one in objects if one["name"].startswith("blkmig-")]
    for block in guest.execute("query-block"):
        limits = block.get("inserted", {})
        found += [f"throttle of {block['device'] or block.get('qdev')}" for key in ("bps", "iops") if limits.get(key)]
    probe = {"type": "unix", "data": {"path": str(guest.directory / "probe")}}
    try:
        guest.execute("nbd-server-start", {"addr": probe})
        guest.execute("nbd-server-stop")
    except QmpError as error:
        found.append(f"NBD server: {error}")
    return found


def write_random(path: Path, format: Format, offset: int, length: int) -> None:
    """Write random bytes into an image that no QEMU has open."""
    source = path.with_name(path.name + ".random")
    source.write_bytes(os.urandom(length))
    _run(["qemu-io", "-f", format, "-c", f"write -q -s {source} {offset} {length}", str(path)])
    source.unlink()


def compare_images(first: Disk, second: Disk) -> None:
    """Assert that two images have the same size and content. Guests that have them open must be paused."""
    sizes = [json.loads(_run(_img("info", disk, "--output=json")))["virtual-size"] for disk in (first, second)]
    assert sizes[0] == sizes[1], f"{first.path} has {sizes[0]} bytes, {second.path} {sizes[1]}"
    command = ["qemu-img", "compare", "-U", "-f", first.format, "-F", second.format]
    compared = subprocess.run([*command, first.path, second.path], capture_output=True, text=True)
    assert compared.returncode == 0, f"{first.path} and {second.path}: {compared.stdout}{compared.stderr}"


@contextlib.contextmanager
def raw_view(disk: Disk) -> Iterator[Path]:
    """The content of an image as a raw file: itself, or a copy that is removed again."""
    if disk.format == "raw":
        yield disk.path
        return
    copy = disk.path.with_name(disk.path.name + ".raw-view")
    try:
        _run([*_img("convert", disk, "-O", "raw"), str(copy)])
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def check_records(disk: Disk, acked: int = 0) -> RecordsReport:
    """Check the records on an image; a guest that has it open must be paused."""
    with raw_view(disk) as path, path.open("rb") as image:
        size = image.seek(0, os.SEEK_END)

        def read_at(offset: int, length: int) -> bytes:
            return os.pread(image.fileno(), length, offset)

        return check(read_at, size, acked=acked)


def assert_records_sound(disk: Disk, acked: int = 0) -> RecordsReport:
    """Check the records on an image, assert that none is lost or torn, and return the report."""
    report = check_records(disk, acked)
    assert report.sound, f"{disk.path}: {report}"
    return report


def assert_files_sound(disk: Disk, acked: int) -> int:
    """Assert that an image made with the guest frozen holds a clean ext4 with all files up to at least `acked`.

    Returns the largest file number in it.
    """
    with raw_view(disk) as path:
        assert "needs_recovery" not in _run(["dumpe2fs", "-h", str(path)]), f"{disk.path}: the ext4 was not frozen"
        checked = subprocess.run(["e2fsck", "-fn", path], capture_output=True, text=True)
        assert checked.returncode == 0, f"e2fsck of {disk.path}: {checked.stdout}{checked.stderr}"
        folder = path.with_name(path.name + ".files")
        folder.mkdir()
        try:
            _run(["debugfs", "-R", f"rdump / {folder}", str(path)])
            numbers = [_file_number(file) for file in folder.iterdir() if file.name.isdigit()]
        finally:
            shutil.rmtree(folder)
    newest = max(numbers, default=0)
    assert newest >= acked, f"{disk.path}: file {newest} is the newest, but the guest had made {acked} safe"
    missing = set(range(max(1, newest - 63), newest + 1)) - set(numbers)
    # The next file may have taken the place of the oldest one and still be under way to its acknowledgement.
    assert not missing, f"{disk.path}: files {sorted(missing)} are missing"
    return newest


def _file_number(file: Path) -> int:
    content = file.read_bytes()
    line = content[: content.find(b"\n") + 1]
    assert line and content == line * (8192 // len(line)), f"{file.name} is torn"
    assert int(line) % 64 == int(file.name), f"{file.name} holds the content of {int(line)}"
    return int(line)


def agent_execute(agent: Path, command: str, timeout: float = 30.0) -> Any:
    """Run a command of the guest agent; raises `LabError` if it refuses or does not answer."""
    with _connect(agent, timeout) as channel, channel.makefile("rb") as lines:
        token = time.monotonic_ns() & 0x7FFFFFFF
        answer: dict[str, Any] = {}
        for message in ({"execute": "guest-sync", "arguments": {"id": token}}, {"execute": command}):
            channel.sendall(json.dumps(message).encode() + b"\n")
            try:
                answer = json.loads(lines.readline() or b"{}")
            except TimeoutError as error:
                raise LabError(f"the guest agent does not answer {message['execute']}") from error
            if "return" not in answer:
                raise LabError(f"guest agent, {message['execute']}: {answer}")
        return answer["return"]


def wait_until(
    condition: Callable[[], bool], what: str, timeout: float = 60.0, detail: Callable[[], str] = str
) -> None:
    """Wait until `condition` holds; `LabError` naming `what`, and adding `detail()`, if it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout:.0f} s in vain for {what}\n{detail()}")
        time.sleep(0.05)


def _disk_arguments(disk: Disk, number: int, style: Style) -> list[str]:
    arguments: list[str] = []
    name = f"disk{number}"
    read_only = "on" if disk.read_only else "off"
    if style == "drive":
        drive = f"file={disk.path},format={disk.format},if=none,id={name},readonly={read_only},discard=unmap"
        arguments += ["-drive", drive]
    else:
        node = f"driver={disk.format},node-name={name},read-only={read_only},discard=unmap"
        file = f"file.driver=file,file.filename={disk.path},file.node-name={name}-file,file.discard=unmap"
        arguments += ["-blockdev", f"{node},{file}"]
    model = "virtio-blk-pci" if disk.bus == "virtio" else "scsi-hd,bus=scsi0.0"
    device = f"{model},drive={name},id=dev{number}"
    if disk.iothread:
        arguments += ["-object", f"iothread,id=io{number}"]
        device += f",iothread=io{number}"
    return [*arguments, "-device", device]


def _cdrom_arguments(hardware: Hardware) -> list[str]:
    arguments: list[str] = []
    if hardware.cdrom:
        drive = f"file={hardware.cdrom},format=raw,if=none,id=cd0,media=cdrom,readonly=on"
        arguments += ["-drive", drive, "-device", "ide-cd,drive=cd0,id=dev-cd0,bus=ide.0"]
    if hardware.empty_drive:
        arguments += ["-device", "ide-cd,id=dev-cd1,bus=ide.1"]
    return arguments


def _img(verb: str, disk: Disk, *more: str) -> list[str]:
    return ["qemu-img", verb, "-U", "-f", disk.format, *more, str(disk.path)]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"{shlex.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def _connect(path: Path, timeout: float) -> socket.socket:
    deadline = time.monotonic() + timeout
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(timeout)
        try:
            client.connect(str(path))
            return client
        except (FileNotFoundError, ConnectionRefusedError) as error:
            client.close()
            if time.monotonic() > deadline:
                raise LabError(f"{path}: {error}") from error
            time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        # A zombie whose other threads still end has its files open.
        return "\nState:\tZ" not in status or "\nThreads:\t1\n" not in status
    except (FileNotFoundError, ProcessLookupError):
        return False


def _marked(mark: str) -> list[int]:
    """Processes whose environment carries the test's mark, except this one; it is inherited, whoever the parent is."""
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]
