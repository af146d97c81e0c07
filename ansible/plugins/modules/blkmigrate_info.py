#!/usr/bin/python
# Copyright (c) The qemu-blkmig developers
# GNU General Public License v2.0 or later (see COPYING or https://www.gnu.org/licenses/gpl-2.0.txt)
# SPDX-License-Identifier: GPL-2.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: blkmigrate_info
short_description: Tells of a host's domains, of its migrations, and of the room it has
version_added: 0.1.0
description:
  - Tells which domains libvirt knows on this host, with their disks, which migrations of qemu-blkmig's there are,
    and how much memory and storage is free.
author:
  - The qemu-blkmig developers (@qemu-blkmig)
requirements:
  - qemu-blkmig and virsh on this host
options:
  name:
    description: Only this domain, by name or UUID, and its migrations.
    type: str
  uri:
    description: This host's libvirt.
    type: str
    default: qemu:///system
  past:
    description: Also migrations that are over. Of those the last hundred are kept.
    type: bool
    default: false
  directories:
    description: Tell how much is free in these directories.
    type: list
    elements: path
    default: []
attributes:
  check_mode:
    description: Nothing is changed.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
seealso:
  - module: qemu_blkmig.libvirt.blkmigrate
"""

EXAMPLES = r"""
- name: What becomes of web1
  qemu_blkmig.libvirt.blkmigrate_info:
    name: web1
    past: true
  register: told
  until: told.jobs[0].state not in ['running', 'busy']
  retries: 60
  delay: 10

- name: Room for images
  qemu_blkmig.libvirt.blkmigrate_info:
    directories: [/var/lib/libvirt/images]
  register: room
"""

RETURN = r"""
domains:
  description: The domains that libvirt knows on this host.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: The domain's name.
      type: str
    uuid:
      description: Its UUID.
      type: str
    state:
      description: Its state, in libvirt's words.
      type: str
    memory:
      description: Bytes of memory that it may have.
      type: int
    disks:
      description: Its disks.
      type: list
      elements: dict
      contains:
        target:
          description: What the domain's XML calls it.
          type: str
        source:
          description: Its image or device. Null for a drive that is empty.
          type: str
        moves:
          description: Whether qemu-blkmig moves it, if it is not told which.
          type: bool
        capacity:
          description: Bytes that the guest sees. Null if libvirt cannot tell.
          type: int
        allocation:
          description: Bytes that it takes of the storage. Null if libvirt cannot tell.
          type: int
jobs:
  description: The migrations, as C(qemu-blkmig status JOB --output json) tells of each.
  returned: success
  type: list
  elements: dict
  contains:
    job:
      description: Its name.
      type: str
    state:
      description: Whether it is V(running), V(busy), V(suspended), V(left behind) or V(finished).
      type: str
    phase:
      description: Its phase.
      type: str
    percent:
      description: How far the first pass over the disks is.
      type: float
    domain:
      description: The domain's C(name), C(uuid), C(name_there) and C(target_uri). Null if it is none of libvirt's.
      type: dict
    guest:
      description: Who has the guest, in words.
      type: str
    next:
      description: What may be done.
      type: str
    outcome:
      description: How it ended. C(exit_code) and C(text).
      type: dict
room:
  description: What is free on this host.
  returned: success
  type: dict
  contains:
    memory:
      description: Bytes of memory that new programs could have.
      type: int
    directories:
      description: What is free in the directories that were asked for. One that is not there is left out.
      type: list
      elements: dict
      contains:
        path:
          description: The directory.
          type: str
        filesystem:
          description: The same number for all directories on one file system.
          type: int
        available:
          description: Bytes.
          type: int
"""

import os
import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.tool import Tool, moves
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.trouble import Trouble
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.virsh import Virsh


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str"},
            "uri": {"type": "str", "default": "qemu:///system"},
            "past": {"type": "bool", "default": False},
            "directories": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    try:
        jobs = Tool(module).jobs(past=wanted["past"])
        if wanted["name"] is not None:
            jobs = [job for job in jobs if moves(job, wanted["name"])]
        domains = list(look(Virsh(module, wanted["uri"]), wanted["name"]))
    except Trouble as trouble:
        module.fail_json(msg=trouble.what, **trouble.facts)
    room = {"memory": free_memory(), "directories": list(free_storage(wanted["directories"]))}
    module.exit_json(changed=False, domains=domains, jobs=jobs, room=room)


def look(virsh, name):
    """The domains, or the one of that name. Raises `Trouble`."""
    for each in virsh.names() if name is None else [name]:
        domain = virsh.domain(each)
        if domain is not None:
            sizes = _sizes(virsh, each)
            unknown = {"capacity": None, "allocation": None}
            yield dict(domain, disks=[dict(disk, **sizes.get(disk["target"], unknown)) for disk in domain["disks"]])


def _sizes(virsh, name):
    """Those of the domain's disks; nothing where virsh does not tell, as of one that is off and lacks an image."""
    try:
        return virsh.sizes(name)
    except Trouble:
        return {}


def free_memory():
    """Bytes that new programs could have; None where Linux does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def free_storage(directories):
    """Of each directory that is there: its path, a number for its file system, and the bytes that are free."""
    for path in directories:
        try:
            filesystem = os.statvfs(path)
            number = Path(path).stat().st_dev
        except OSError:
            continue
        yield {"path": path, "filesystem": number, "available": filesystem.f_bavail * filesystem.f_frsize}


if __name__ == "__main__":
    main()
