# Copyright (c) The qemu-blkmig developers
# GNU General Public License v2.0 or later (see COPYING or https://www.gnu.org/licenses/gpl-2.0.txt)
# SPDX-License-Identifier: GPL-2.0-or-later
"""Which guest fits on which host."""

from __future__ import annotations

DOCUMENTATION = r"""
name: placement
short_description: Which domain fits on which host
version_added: 0.1.0
author:
  - The qemu-blkmig developers (@qemu-blkmig)
description:
  - Finds a host for each domain, by the memory and the storage that are free there.
  - The domains with the most memory come first. Each goes to the host that then has the most memory left, of those
    where its memory fits, and all of its images into their directories.
options:
  _input:
    description: The domains, as M(qemu_blkmig.libvirt.blkmigrate_info) tells of them.
    type: list
    elements: dict
    required: true
  rooms:
    description: What M(qemu_blkmig.libvirt.blkmigrate_info) returned on each host, by the host's name.
    type: dict
    required: true
"""

EXAMPLES = r"""
# Where each domain of hosta would go
where: >-
  {{ told.domains | qemu_blkmig.libvirt.placement({'hostb': told_by_b, 'hostc': told_by_c}) }}
"""

RETURN = r"""
_value:
  description: The host by the domain's name. A domain that fits nowhere is not in it.
  type: dict
"""

from pathlib import Path


class _Room:
    """What is left on a host."""

    def __init__(self, room):
        self.memory = room["memory"] or 0
        self._filesystems = {each["path"]: each["filesystem"] for each in room["directories"]}
        self._available = {each["filesystem"]: each["available"] for each in room["directories"]}

    def fits(self, domain):
        """Whether the domain's memory and images do."""
        needed = self._needed(domain)
        return (
            domain["memory"] <= self.memory
            and needed is not None
            and all(size <= self._available[filesystem] for filesystem, size in needed.items())
        )

    def take(self, domain):
        """Count its memory and images as used."""
        self.memory -= domain["memory"]
        for filesystem, size in self._needed(domain).items():
            self._available[filesystem] -= size

    def _needed(self, domain):
        """Bytes by file system; None where a directory is missing."""
        needed = {}
        for disk in domain["disks"]:
            if not disk["moves"]:
                continue
            filesystem = self._filesystems.get(str(Path(disk["source"]).parent))
            if filesystem is None:
                return None
            needed[filesystem] = needed.get(filesystem, 0) + (disk["allocation"] or 0)
        return needed


def placement(domains, rooms):
    """The host by the domain's name."""
    left = {host: _Room(told["room"]) for host, told in rooms.items()}
    placed = {}
    for domain in sorted(domains, key=lambda each: (-each["memory"], each["name"])):
        fitting = [host for host, room in left.items() if room.fits(domain)]
        if fitting:
            host = max(fitting, key=lambda each: left[each].memory)
            left[host].take(domain)
            placed[domain["name"]] = host
    return placed


class FilterModule:
    """Makes the filter known."""

    def filters(self):
        """By name."""
        return {"placement": placement}
