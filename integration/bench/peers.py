"""Who copies: qemu-blkmig and its peers, each as its users would run it, from a QEMU that has the images open.

A peer's servers are started, and its images made, before the clock is. Ours makes its own, and all of its command
counts, but for the row `blkmig (pass)`: the time of the first pass alone, as the tool told it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from integration.bench.cases import MIRROR, NBDCOPY, Case
from integration.bench.images import Image, spoil
from integration.bench.lines import FIRST_PORT, Line
from integration.bench.measuring import FirstByte, Meter, Usage, cpu_seconds
from tests.stream.qemus import Qemu, qemu

POLL = 0.005
REST = 0.4


@dataclass(frozen=True)
class Setting:
    """One copy: the images `images` go to files of the same names in `target`. `scratch`: for sockets.

    `line`: to another host, where they are to go.
    """

    case: Case
    images: Sequence[Image]
    target: Path
    scratch: Path
    line: Line | None = None

    @property
    def here(self) -> Sequence[str]:
        """Before a command on the source's host."""
        return self.line.here if self.line else ()

    @property
    def there(self) -> Sequence[str]:
        """Before a command on the destination's host."""
        return self.line.there if self.line else ()

    @property
    def source(self) -> str:
        """The source's address."""
        return self.line.source if self.line else "127.0.0.1"

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

    def is_intact(self) -> bool:
        """Whether what arrived is what was there."""
        return all(image.same_as(self.arrived(image)) for image in self.images)

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
            command = self._command(setting, running)
            first = FirstByte(setting.arrived(setting.images[0]))
            with meter, first if self._begins_empty(setting.case) else contextlib.nullcontext():
                process = subprocess.Popen(command, stdout=subprocess.PIPE)
                meter.add(process.pid, "source")
                told, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
        whole = meter.usage
        rows = {self.name: whole}
        rows[f"{self.name} (pass)"] = replace(whole, seconds=json.loads(told)["phases"]["bulk"])
        if first.seconds is not None:
            rows[f"{self.name} (first byte)"] = replace(whole, seconds=first.seconds)
        return rows

    def _command(self, setting: Setting, running: Qemu) -> list[str]:
        place = setting.line.place(setting.target) if setting.line else f"local:{setting.target}"
        command = [*setting.here, sys.executable, "-m", "qemu_blkmig", "copy", f"qmp:{running.qmp}", place]
        command += ["--progress", "none", "--output", "json", *self._options]
        if setting.case.way in ("tcp", "tls"):
            command += ["--data", f"{setting.case.way}://{setting.source}:{FIRST_PORT}"]
        if setting.case.way == "tcp":
            command.append("--insecure")
        if setting.case.contents == "overlay":
            command += ["--shared-base", "--base-check", "size"]
        return command

    def _begins_empty(self, case: Case) -> bool:
        """Whether the first byte written shows: qcow2 has some of its own."""
        return case.format == "raw" and not case.warm and case.contents != "zeroes"


class Pull:
    """A program at the destination that reads the source QEMU's NBD export; one for each disk."""

    def __init__(self, name: str, *, through_server: bool = False) -> None:
        self.name = name
        self._through_server = through_server

    def applies(self, case: Case) -> bool:
        """See `Peer`: what an overlay leaves to its base, NBD's clients do not tell from what is its own."""
        if case.contents == "overlay" or case.way == "ssh":
            return False
        if case.far or case.way == "tls":
            return self.name == NBDCOPY
        return case.format == "raw" or self.name != NBDCOPY

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
                processes = [subprocess.Popen([*setting.there, *command]) for command in commands]
                for process in processes:
                    meter.add(process.pid, "destination")
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

    name = MIRROR

    def applies(self, case: Case) -> bool:
        """See `Peer`: of a huge disk it writes every empty MiB as zeroes, which takes minutes."""
        return case.contents != "huge" and case.way in ("unix", "tcp") and not case.far

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

    With a downtime limit of 1 ms: with the default it loses data (FACTS.md), and with this one where its destination is
    slower than its source.
    """

    name = "migrate blk=true"

    def applies(self, case: Case) -> bool:
        """See `Peer`: with `inc` it would send overlays, too; that is not measured."""
        return case.contents not in ("overlay", "huge") and case.way in ("unix", "tcp") and not case.far

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
        return case.format == "raw" and case.contents == "full" and not case.far

    def copy(self, setting: Setting) -> dict[str, Usage]:
        """See `Peer`."""
        setting.prepare(created=True)
        with Meter() as meter:
            pairs = [(f"if={image.path}", f"of={setting.arrived(image)}") for image in setting.images]
            commands = [["dd", *pair, "bs=4M", "conv=notrunc", "status=none"] for pair in pairs]
            processes = [subprocess.Popen(command) for command in commands]
            for process in processes:
                meter.add(process.pid, "destination")
            for process in processes:
                process.wait()
        return {self.name: meter.usage}


@contextlib.contextmanager
def source(setting: Setting, *devices: str) -> Iterator[tuple[Qemu, Meter]]:
    """A QEMU that runs nothing and has the images open, and a meter that counts it.

    It has come to rest: its BIOS takes a CPU for a second or two until it has found nothing to boot.
    """
    with qemu(setting.scratch / "source", *(devices or blockdevs(setting)), prefix=setting.here) as running:
        wait_for_rest(running.process.pid)
        meter = Meter()
        meter.add(running.process.pid, "source")
        if setting.line is not None:
            meter.add(setting.line.hosts.sshd_pid, "destination")
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
    if setting.case.way in ("tcp", "tls"):
        address = {"type": "inet", "data": {"host": setting.source, "port": str(FIRST_PORT)}}
        uri = f"nbd://{setting.source}:{FIRST_PORT}/{{}}"
        more = {}
        if setting.case.way == "tls":
            keys = setting.scratch / "source" / "keys.psk"
            keys.write_text(f"bench:{os.urandom(32).hex()}\n")
            running("object-add", qom_type="tls-creds-psk", id="key", dir=str(keys.parent), endpoint="server")
            uri = f"nbds://bench@{setting.source}:{FIRST_PORT}/{{}}?tls-psk-file={keys}"
            more = {"tls_creds": "key"}
        running("nbd-server-start", addr=address, **more)
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
