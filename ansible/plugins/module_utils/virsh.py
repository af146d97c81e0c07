# Copyright (c) The qemu-blkmig developers
# GNU General Public License v2.0 or later (see COPYING or https://www.gnu.org/licenses/gpl-2.0.txt)
# SPDX-License-Identifier: GPL-2.0-or-later
"""What libvirt knows of domains, asked by virsh."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.trouble import Trouble

SHUT_OFF = "shut off"
_C_LOCALE = {"LC_ALL": "C", "LANGUAGE": "C"}


class Virsh:
    """One libvirt, by its `uri`; `module` runs the commands."""

    def __init__(self, module, uri):
        self._module = module
        self._program = module.get_bin_path("virsh", required=True)
        self.uri = uri

    def host(self):
        """The name of the host that this libvirt runs on. Raises `Trouble`."""
        return self._run("hostname").strip()

    def names(self):
        """Of all domains, running or not. Raises `Trouble`."""
        return [line.strip() for line in self._run("list", "--all", "--name").splitlines() if line.strip()]

    def domain(self, name):
        """What is known of a domain (see `described`) and its state; None if there is none. Raises `Trouble`."""
        try:
            state = self._run("domstate", "--domain", name).strip()
            return dict(described(self._run("dumpxml", "--domain", name)), state=state)
        except Trouble as trouble:
            if "failed to get domain" in trouble.what:
                return None
            raise

    def sizes(self, name):
        """Bytes of each disk by its target: `capacity`, and `allocation` on its storage. Raises `Trouble`."""
        found = {}
        for line in self._run("domblkinfo", "--domain", name, "--all").splitlines():
            words = line.split()
            if len(words) == 4 and all(word.isdigit() for word in words[1:]):
                found[words[0]] = {"capacity": int(words[1]), "allocation": int(words[2])}
        return found

    def _run(self, *words):
        command = [self._program, "--quiet", "--connect", self.uri, *words]
        code, told, complaint = self._module.run_command(command, environ_update=_C_LOCALE)
        if code:
            reasons = [line.strip() for line in complaint.replace("error: ", "").splitlines() if line.strip()]
            raise Trouble(f"{self.uri}: {': '.join(reasons) or f'virsh ends with {code}'}")
        return told


def described(xml):
    """Name, UUID, memory (bytes) and disks of a domain's XML.

    Of each disk: its target, source (None where it has none), and whether qemu-blkmig moves it by itself.
    """
    root = ElementTree.fromstring(xml)
    memory = root.find("memory")
    return {
        "name": root.findtext("name"),
        "uuid": root.findtext("uuid"),
        "memory": _in_bytes(memory) if memory is not None else None,
        "disks": [_disk(disk) for disk in root.iterfind("devices/disk")],
    }


def _disk(disk):
    source, target = disk.find("source"), disk.find("target")
    kept = any(disk.find(mark) is not None for mark in ("readonly", "shareable", "transient"))
    local = disk.get("type", "file") in ("file", "block", "volume")
    path = None
    if source is not None:
        path = source.get("file") or source.get("dev") or source.get("name")
        if path is None and source.get("volume") is not None:
            path = f"{source.get('pool')}/{source.get('volume')}"
    return {
        "target": target.get("dev") if target is not None else None,
        "source": path,
        "moves": path is not None and local and disk.get("device", "disk") == "disk" and not kept,
    }


def _in_bytes(element):
    number, unit = int(element.text), element.get("unit", "KiB")
    match = re.match(r"([kKMGT]?)(iB|B|b|bytes)?$", unit)
    factor = 1000 if match and match.group(2) == "B" else 1024
    return number * factor ** " kmgt".index((match.group(1) if match else "k").lower() or " ")
