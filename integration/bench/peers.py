"""Who copies: qemu-blkmig and its peers, each as its users would run it, from a QEMU that has the images open.

A peer's servers are started, and its images made, before the clock is. Ours makes its own, and all of its command
counts, but for the row `blkmig (pass)`: the time of the first pass alone, as the tool told it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from integration.bench.cases import Case
from integration.bench.images import Image, spoil
from integration.bench.measuring import Meter, Usage, cpu_seconds
from tests.stream.qemus import Qemu, qemu

POLL = 0.005
REST = 0.4
FIRST_PORT = 10809


@dataclass(frozen=True)
class Setting:
    """One copy: the images `images` go to files of the same names in `target`. `scratch`: for sockets."""

    case: Case
    images: Sequence[Image]
    target: Path
    scratch: Path

    def arrived(self, image: Image) -> Path:
        """Where an image is copied to."""
        return self.target / image.path.name

    def prepare(self, *, created: bool) -> None:
        """Have the target's images as the case wants them; `created`: also those that a tool could make itself."""
        for image in self.images:
            path = self.arrived(image)
            if self.case.warm:
                spoil(path, image.size)
            else:
                path.unlink(missing_ok=True)
                if created:
                    image.create(path)

    def check(self) -> None:
        """Raise `RuntimeError` where what arrived is not what was there."""
        for image in self.images:
            if not image.same_as(self.arrived(image)):
                raise RuntimeError(f"{self.case.name}: {self.arrived(image)} differs from {image.path}")

    def server(self, number: int) -> tuple[list[str], str, dict[str, Any]]:
        """qemu-nbd's options, a URI's beginning, and QMP's address of the NBD server of a disk at the destination."""
        if self.case.way == "tcp":
            port = str(FIRST_PORT + 1 + number)
            return ["-b", "127.0.0.1", "-p", port], f"nbd://127.0.0.1:{port}/", inet(port)
        path = str(self.scratch / f"nbd{number}")
        return ["-k", path], f"nbd+unix:///?socket={path}", {"type": "unix", "path": path}


class Peer(Protocol):
    """A way to copy. `name` is what the table calls it."""

    name: str

    def applies(self, case: Case) -> bool:
        """Whether it can do such a case at all."""

    def copy(self, setting: Setting) -> dict[str, Usage]:
        """Copy, and tell what it cost, by row of the table."""


class Blkmig:
    """`qemu-blkmig copy` of the running QEMU's disks; `verify`: as its option."""

    def __init__(self, name: str, verify: str, *options: str) -> None:
        self.name = name
        self._options = ("--verify", verify, *options)

    def applies(self, case: Case) -> bool:
        """See `Peer`."""
        return True

    def copy(self, setting: Setting) -> dict[str, Usage]:
        """See `Peer`."""
        setting.prepare(created=False)
        with source(setting) as (running, meter):
            command = [sys.executable, "-m", "qemu_blkmig", "copy", f"qmp:{running.qmp}", f"local:{setting.target}"]
            command += ["--progress", "none", "--output", "json", *self._options]
            if setting.case.way == "tcp":
                command += ["--data", "tcp://127.0.0.1", "--insecure"]
            if setting.case.contents == "overlay":
                command += ["--shared-base", "--base-check", "size"]
            with meter:
                process = subprocess.Popen(command, stdout=subprocess.PIPE)
                meter.add(process.pid, "source", anew=True)
                told, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
        alone = json.loads(told)["phases"]["bulk"]
        whole = meter.usage
        usage = Usage(alone, whole.source_cpu, whole.destination_cpu, whole.source_memory, whole.destination_memory)
        return {self.name: whole, f"{self.name} (pass)": usage}


class Pull:
    """A program at the destination that reads the source QEMU's NBD export; one for each disk."""

    def __init__(self, name: str, *, through_server: bool = False) -> None:
        self.name = name
        self._through_server = through_server

    def applies(self, case: Case) -> bool:
        """See `Peer`: what an overlay leaves to its base, NBD's clients do not tell from what is its own."""
        return case.contents != "overlay" and (case.format == "raw" or self.name != "nbdcopy")

    def copy(self, setting: Setting) -> dict[str, Usage]:
        """See `Peer`."""
        setting.prepare(created=True)
        with source(setting) as (running, meter), contextlib.ExitStack() as stack:
            begin = export(running, setting)
            commands = []
            for number, image in enumerate(setting.images):
                to = str(setting.arrived(image))
                if self._through_server:
                    to = stack.enter_context(serving(setting, number, meter))
                commands.append(self._command(setting, image, begin.format(image.path.stem), to))
            with meter:
                processes = [subprocess.Popen(command) for command in commands]
                for process in processes:
                    meter.add(process.pid, "destination", anew=True)
                statuses = [process.wait() for process in processes]
                if any(statuses):
                    raise RuntimeError(f"{self.name} failed")
        return {self.name: meter.usage}

    def _command(self, setting: Setting, image: Image, uri: str, to: str) -> list[str]:
        fresh = not setting.case.warm
        if self.name.startswith("nbdcopy"):
            return ["nbdcopy", *(["--destination-is-zero"] if fresh else []), uri, to]
        zero = ["--target-is-zero"] if fresh else []
        return ["qemu-img", "convert", "-n", "-W", "-m", "16", *zero, "-f", "raw", "-O", image.format, uri, to]


class Mirror:
    """`blockdev-mirror` of the source QEMU to a qemu-nbd at the destination, until it is ready and was ended."""

    name = "blockdev-mirror"

    def applies(self, case: Case) -> bool:
        """See `Peer`."""
        return True

    def copy(self, setting: Setting) -> dict[str, Usage]:
        """See `Peer`."""
        setting.prepare(created=True)
        with source(setting) as (running, meter), contextlib.ExitStack() as stack:
            for number in range(len(setting.images)):
                stack.enter_context(serving(setting, number, meter))
            with meter:
                for number, image in enumerate(setting.images):
                    name, address = image.path.stem, setting.server(number)[2]
                    running("blockdev-add", driver="nbd", node_name=f"to-{name}", server=address, discard="unmap")
                    running("blockdev-mirror", job_id=f"mirror-{name}", device=name, target=f"to-{name}",
                            sync="top" if image.base else "full")  # fmt: skip
                waiting = {f"mirror-{image.path.stem}" for image in setting.images}
                while waiting:
                    for job in running("query-block-jobs"):
                        if job["device"] in waiting and job["ready"]:
                            running("block-job-cancel", device=job["device"])
                            waiting.remove(job["device"])
                    time.sleep(POLL)
                while running("query-block-jobs"):
                    time.sleep(POLL)
        return {self.name: meter.usage}


class OldEngine:
    """QEMU's own block migration to a QEMU that waits, its 16 MiB of RAM included.

    With a downtime limit of 1 ms: with the default it loses data (FACTS.md).
    """

    name = "migrate blk=true"

    def applies(self, case: Case) -> bool:
        """See `Peer`: with `inc` it would send overlays, too; that is not measured."""
        return case.contents != "overlay"

    def copy(self, setting: Setting) -> dict[str, Usage]:
        """See `Peer`."""
        setting.prepare(created=True)
        uri = f"tcp:127.0.0.1:{FIRST_PORT}" if setting.case.way == "tcp" else f"unix:{setting.scratch}/migration"
        incoming = [*drives(setting, setting.target), "-incoming", uri]
        with source(setting, *drives(setting, setting.images[0].path.parent)) as (running, meter):
            with qemu(setting.scratch / "destination", *incoming) as waiting:
                meter.add(waiting.process.pid, "destination")
                running("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=1)
                with meter:
                    running("migrate", uri=uri, blk=True)
                    while (status := running("query-migrate").get("status")) not in ("completed", "failed"):
                        time.sleep(POLL)
                if status == "failed":
                    raise RuntimeError(f"{self.name} failed")
                waiting.quit()
            shutil.rmtree(setting.scratch / "destination")
        return {self.name: meter.usage}


class Files:
    """`dd` from file to file: what the machine itself can do, with no QEMU that has the image open."""

    name = "dd"

    def applies(self, case: Case) -> bool:
        """See `Peer`."""
        return case.format == "raw" and case.contents == "full"

    def copy(self, setting: Setting) -> dict[str, Usage]:
        """See `Peer`."""
        setting.prepare(created=True)
        with Meter() as meter:
            pairs = [(f"if={image.path}", f"of={setting.arrived(image)}") for image in setting.images]
            commands = [["dd", *pair, "bs=4M", "conv=notrunc", "status=none"] for pair in pairs]
            processes = [subprocess.Popen(command) for command in commands]
            for process in processes:
                meter.add(process.pid, "destination", anew=True)
            for process in processes:
                process.wait()
        return {self.name: meter.usage}


BASELINE = Mirror.name
PEERS: tuple[Peer, ...] = (
    Blkmig("blkmig", "none"),
    Blkmig("blkmig verified", "written"),
    Mirror(),
    Pull("nbdcopy"),
    Pull("nbdcopy to qemu-nbd", through_server=True),
    Pull("qemu-img convert"),
    OldEngine(),
    Files(),
)


@contextlib.contextmanager
def source(setting: Setting, *devices: str) -> Iterator[tuple[Qemu, Meter]]:
    """A QEMU that runs nothing and has the images open, and a meter that counts it.

    It has come to rest: its BIOS takes a CPU for a second or two until it has found nothing to boot.
    """
    with qemu(setting.scratch / "source", *(devices or blockdevs(setting))) as running:
        wait_for_rest(running.process.pid)
        meter = Meter()
        meter.add(running.process.pid, "source")
        yield running, meter
    shutil.rmtree(setting.scratch / "source")


def wait_for_rest(pid: int) -> None:
    """Wait until a process has used (almost) no CPU for `REST` seconds."""
    used, now = -1.0, cpu_seconds(pid)
    while now - used > REST / 20:
        time.sleep(REST)
        used, now = now, cpu_seconds(pid)


def blockdevs(setting: Setting) -> list[str]:
    """QEMU's arguments for the images, each a node of its own name."""
    arguments = []
    for image in setting.images:
        name = image.path.stem
        node = f"driver={image.format},node-name={name},file.driver=file,file.filename={image.path},discard=unmap"
        arguments += ["-blockdev", node, "-device", f"virtio-blk-pci,drive={name},id={name}"]
    return arguments


def drives(setting: Setting, directory: Path) -> list[str]:
    """The same in the way that the old engine needs, for the images in `directory`."""
    arguments = []
    for image in setting.images:
        option = f"file={directory / image.path.name},format={image.format},if=virtio,id={image.path.stem}"
        arguments += ["-drive", option]
    return arguments


def export(running: Qemu, setting: Setting) -> str:
    """Export all nodes; the URI of an export, with {} for its name."""
    if setting.case.way == "tcp":
        running("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": str(FIRST_PORT)}})
        uri = f"nbd://127.0.0.1:{FIRST_PORT}/{{}}"
    else:
        place = setting.scratch / "source" / "nbd"
        running("nbd-server-start", addr={"type": "unix", "data": {"path": str(place)}})
        uri = f"nbd+unix:///{{}}?socket={place}"
    for image in setting.images:
        name = image.path.stem
        running("block-export-add", type="nbd", id=name, node_name=name, name=name)
    return uri


@contextlib.contextmanager
def serving(setting: Setting, number: int, meter: Meter) -> Iterator[str]:
    """A qemu-nbd with the image of a disk at the destination; its URI."""
    options, uri, _ = setting.server(number)
    image = setting.images[number]
    command = ["qemu-nbd", "--persistent", "--shared", "16", "--cache", "writeback", "--discard", "unmap"]
    command += ["--format", image.format, *options, str(setting.arrived(image))]
    server = subprocess.Popen(command)
    try:
        while subprocess.run(["nbdinfo", "--size", uri], capture_output=True).returncode:
            if server.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended")
            time.sleep(POLL)
        meter.add(server.pid, "destination")
        yield uri
    finally:
        server.terminate()
        server.wait()


def inet(port: str) -> dict[str, Any]:
    """QMP's address of a local TCP port."""
    return {"type": "inet", "host": "127.0.0.1", "port": port}
