"""Peers that only some cases are compared with: over a line to another host, and of a huge disk."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from integration.bench.cases import CONNECTION, SMALL, SSH, Case
from integration.bench.images import Image, make
from integration.bench.lines import FIRST_PORT
from integration.bench.measuring import Meter, Usage
from integration.bench.peers import Blkmig, Setting
from integration.hosts import REPOSITORY


class Piped:
    """`ssh hostb 'cat > image' < image`: what ssh itself carries, with the ciphers that ours prefers."""

    name = SSH

    def applies(self, case: Case) -> bool:
        """See `Peer`."""
        return case.way == "ssh" and case.format == "raw" and case.disks == 1

    def copy(self, setting: Setting) -> dict[str, Usage]:
        """See `Peer`."""
        assert setting.line is not None
        setting.prepare(created=True)
        (image,) = setting.images
        command = [*setting.line.ssh, f"cat 1<> {shlex.quote(str(setting.arrived(image)))}"]
        with Meter() as meter, image.path.open("rb") as file:
            meter.add(setting.line.hosts.sshd_pid, "destination")
            process = subprocess.Popen(command, stdin=file)
            meter.add(process.pid, "source")
            if process.wait():
                raise RuntimeError(f"{self.name} failed")
        return {self.name: meter.usage}


class Connection:
    """The file through one TCP connection (`plain`): what the line carries."""

    name = CONNECTION

    def applies(self, case: Case) -> bool:
        """See `Peer`."""
        return case.far and case.way != "ssh" and case.format == "raw" and case.disks == 1

    def copy(self, setting: Setting) -> dict[str, Usage]:
        """See `Peer`."""
        setting.prepare(created=True)
        (image,) = setting.images
        sender = subprocess.Popen(
            self._command(setting.here, "send", setting, image), stdout=subprocess.PIPE, cwd=REPOSITORY
        )
        assert sender.stdout is not None
        sender.stdout.readline()
        with Meter() as meter:
            meter.add(sender.pid, "source")
            receiver = subprocess.Popen(self._command(setting.there, "receive", setting, image))
            meter.add(receiver.pid, "destination")
            if receiver.wait() or sender.wait():
                raise RuntimeError(f"{self.name} failed")
        return {self.name: meter.usage}

    def _command(self, prefix: Sequence[str], verb: str, setting: Setting, image: Image) -> list[str]:
        path = image.path if verb == "send" else setting.arrived(image)
        command = [sys.executable, str(REPOSITORY / "integration/bench/plain.py"), verb]
        return [*prefix, *command, setting.source, str(FIRST_PORT), str(path)]


class Small(Blkmig):
    """Ours, of a disk that is full of as much data as the huge one has."""

    def __init__(self) -> None:
        super().__init__(SMALL, "none")

    def applies(self, case: Case) -> bool:
        """See `Peer`."""
        return case.contents == "huge"

    def setting(self, huge: Setting) -> Setting:
        """The small disk's, which is made at first."""
        (image,) = huge.images
        path = image.path.with_name("small.qcow2")
        small = Image(path, image.format, image.data, image.data)
        return replace(huge, images=[small if path.exists() else make("full", path, image.format, image.data)])
