#!/usr/bin/python
# Copyright (c) The qemu-blkmig developers
# GNU General Public License v2.0 or later (see COPYING or https://www.gnu.org/licenses/gpl-2.0.txt)
# SPDX-License-Identifier: GPL-2.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: blkmigrate
short_description: Moves a libvirt domain with its local disks to another host
version_added: 0.1.0
description:
  - Sees to it that a domain of libvirt's, with its local disks, is at another host, by C(virsh-blkmigrate).
  - It is to be run on the host that the domain leaves.
  - A migration does not end with the module. Whatever ends that (a time limit of Ansible's, a lost connection)
    leaves the migration at work, and the next run waits for it. O(state=aborted) gives it up.
author:
  - The qemu-blkmig developers (@qemu-blkmig)
requirements:
  - qemu-blkmig on both hosts, of the same version
  - virsh on this host
options:
  name:
    description: Name or UUID of the domain.
    type: str
    required: true
  dest_uri:
    description:
      - The destination's libvirt, as C(virsh) on this host reaches it, such as V(qemu+ssh://hostb/system).
      - Its images are written by qemu-blkmig, which is reached by the same ssh.
      - Needed unless O(state=aborted).
      - If it holds a password, that is not logged.
    type: str
  uri:
    description: This host's libvirt.
    type: str
    default: qemu:///system
  state:
    description:
      - V(migrated) moves the domain, unless it is there already.
      - V(planned) tells what that would do, and fails if it would be refused. Nothing is touched.
      - V(aborted) gives up a migration of the domain that runs, or was suspended. The guest stays.
    type: str
    choices: [migrated, planned, aborted]
    default: migrated
  disks:
    description: Only these disks, by target, such as V(vda). By default all that are local and writable.
    type: list
    elements: str
  paths:
    description: Where images are to be there, by the disk's target. The same path as here, if it is not given.
    type: dict
  pool:
    description: The storage pool there that takes all images without one of O(paths).
    type: str
  shared_base:
    description: The destination has the backing files. Only the overlays are copied.
    type: bool
    default: false
  offline:
    description: Move the domain also if it does not run. It is defined there, its images are copied.
    type: bool
    default: false
  persistent:
    description: The domain is defined there.
    type: bool
    default: true
  undefine_source:
    description: The domain is no longer defined here, once it has moved.
    type: bool
    default: true
  bandwidth:
    description: Most MiB a second, such as V(100), or bytes a second with a suffix, such as V(512k).
    type: str
  downtime:
    description: Longest pause of the guest to aim at, in milliseconds. The default is 300.
    type: int
  max_rounds:
    description: How often what the guest writes meanwhile is copied, before it is a stall. The default is 30.
    type: int
  on_stall:
    description: What is done then. The default is V(abort).
    type: str
    choices: [abort, pause, wait, throttle]
  verify:
    description: How the copy is proven equal. The default is V(written).
    type: str
    choices: [written, full, none]
  retry:
    description: How often to go on by itself after a failure that may pass.
    type: int
    default: 0
  resume:
    description:
      - Go on with a migration of the domain that was suspended. Of the options only O(bandwidth), O(downtime),
        O(max_rounds), O(on_stall) and O(retry) can be other than they were.
      - If V(false), it is given up, and the migration starts over.
    type: bool
    default: true
  options:
    description: Further options of C(virsh-blkmigrate), word by word.
    type: list
    elements: str
    default: []
  wait:
    description:
      - Wait until the domain has moved.
      - If V(false), return when its disks are being copied. M(qemu_blkmig.libvirt.blkmigrate_info) tells what becomes
        of it.
    type: bool
    default: true
attributes:
  check_mode:
    description: Runs the whole preflight, as O(state=planned) does, and fails where that refuses.
    support: full
  diff_mode:
    description: Shows where the domain and its disks' images are.
    support: full
notes:
  - A domain that is active on both hosts is an error, unless a migration of ours is under way.
  - One that is active at the destination and not here is where it is to be, whether it is still defined here or not.
seealso:
  - module: qemu_blkmig.libvirt.blkmigrate_info
"""

EXAMPLES = r"""
- name: The guest web1 is on hostb
  qemu_blkmig.libvirt.blkmigrate:
    name: web1
    dest_uri: qemu+ssh://hostb/system

- name: Look first
  qemu_blkmig.libvirt.blkmigrate:
    name: web1
    dest_uri: qemu+ssh://hostb/system
    state: planned
  register: looked

- name: The root disk's base is there already, the data disk goes elsewhere, the line is slow
  qemu_blkmig.libvirt.blkmigrate:
    name: web1
    dest_uri: qemu+ssh://hostb/system
    shared_base: true
    paths:
      vdb: /srv/big/web1-data.raw
    bandwidth: 50
    downtime: 500
    retry: 5

- name: Start it, and come back later
  qemu_blkmig.libvirt.blkmigrate:
    name: web1
    dest_uri: qemu+ssh://hostb/system
    wait: false

- name: Give it up
  qemu_blkmig.libvirt.blkmigrate:
    name: web1
    state: aborted
"""

RETURN = r"""
action:
  description: What was done, or would be done in check mode.
  returned: success
  type: str
  sample: start
  choices: [none, plan, start, attach, resume, abort]
here:
  description: The domain's state here in libvirt's words. Null if it is not known here.
  returned: unless O(state=aborted)
  type: str
  sample: null
there:
  description: The same at the destination.
  returned: unless O(state=aborted)
  type: str
  sample: running
uuid:
  description: The domain's UUID.
  returned: unless O(state=aborted)
  type: str
  sample: 6b0d5a36-4b7c-4b8e-9d54-0f8a4f6f1c11
plan:
  description: What the preflight found, as C(virsh-blkmigrate --dry-run --output json) tells it, but for the XML.
  returned: in check mode and with O(state=planned), also if it refuses
  type: dict
  contains:
    ready:
      description: Whether a migration would start.
      type: bool
    disks:
      description: The disks that would be copied, with their source and destination, format and sizes in bytes.
      type: list
    left_alone:
      description: Disks that stay as they are, and why.
      type: list
    problems:
      description: Why it would be refused.
      type: list
    warnings:
      description: What should be known.
      type: list
result:
  description: What was done, as C(virsh-blkmigrate --output json) tells it.
  returned: when this run has started or resumed the migration, and waited for its end
  type: dict
  contains:
    job:
      description: The migration's name in C(qemu-blkmig jobs --all).
      type: str
    disks:
      description: Each disk's source and destination, format and sizes, and the bytes that were copied.
      type: list
    total_copied:
      description: Bytes that were copied in all.
      type: int
    phases:
      description: Seconds by phase.
      type: dict
    downtime:
      description: Seconds that the guest stood still, in all and by cause. Null if it was not running.
      type: dict
    verified:
      description: What was proven.
      type: str
    warnings:
      description: What should be known.
      type: list
job:
  description: The migration's name in C(qemu-blkmig jobs). After a failure the one that can be resumed.
  returned: when there is one
  type: str
  sample: 1a2b3c4d
status:
  description: How the migration stands, as C(qemu-blkmig status JOB --output json) tells it.
  returned: when it was found under way, and with O(wait=false)
  type: dict
error:
  description: The error, as C(virsh-blkmigrate --output json) tells it.
  returned: when the command fails
  type: dict
  contains:
    exit_code:
      description: The command's exit code. 3 is refused, nothing was touched. 4 is undecided, a person must look.
      type: int
    kind:
      description: The kind of error.
      type: str
    what:
      description: What happened.
      type: str
    disk:
      description: The disk that it is about. Null if it is not about one alone.
      type: str
    state:
      description: How things stand.
      type: str
    advice:
      description: What to do next.
      type: str
    suspended:
      description: The job that the next run goes on with.
      type: str
"""

from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.migration import Migration
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.tool import Tool
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.trouble import Trouble
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.virsh import Virsh


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "dest_uri": {"type": "str"},
            "uri": {"type": "str", "default": "qemu:///system"},
            "state": {"type": "str", "default": "migrated", "choices": ["migrated", "planned", "aborted"]},
            "disks": {"type": "list", "elements": "str"},
            "paths": {"type": "dict"},
            "pool": {"type": "str"},
            "shared_base": {"type": "bool", "default": False},
            "offline": {"type": "bool", "default": False},
            "persistent": {"type": "bool", "default": True},
            "undefine_source": {"type": "bool", "default": True},
            "bandwidth": {"type": "str"},
            "downtime": {"type": "int"},
            "max_rounds": {"type": "int"},
            "on_stall": {"type": "str", "choices": ["abort", "pause", "wait", "throttle"]},
            "verify": {"type": "str", "choices": ["written", "full", "none"]},
            "retry": {"type": "int", "default": 0},
            "resume": {"type": "bool", "default": True},
            "options": {"type": "list", "elements": "str", "default": []},
            "wait": {"type": "bool", "default": True},
        },
        required_if=[("state", "migrated", ["dest_uri"]), ("state", "planned", ["dest_uri"])],
        supports_check_mode=True,
        # syslog would have the URIs before hide_passwords has seen them.
        no_log=True,
    )
    hide_passwords(module)
    try:
        tool = Tool(module)
        if module.params["state"] == "aborted":
            module.exit_json(**abort(tool, module.params["name"], module.check_mode))
        here, there = Virsh(module, module.params["uri"]), Virsh(module, module.params["dest_uri"])
        migration = Migration(module.params, tool, here, there)
        module.exit_json(**migration.run(module.check_mode))
    except Trouble as trouble:
        module.fail_json(msg=trouble.what, **trouble.facts)


def hide_passwords(module):
    """See to it that a password in a URI is shown nowhere."""
    for name in ("uri", "dest_uri"):
        try:
            password = urlsplit(module.params[name] or "").password
        except ValueError:
            password = None
        if password:
            module.no_log_values.add(password)


def abort(tool, name, check_mode):
    """Give up what is under way, or left, of the domain's migrations; what the module returns. Raises `Trouble`."""
    jobs = tool.jobs_of(name)
    for job in jobs if not check_mode else []:
        tool.cancel(job["job"])
    told = {"changed": bool(jobs), "action": "abort" if jobs else "none"}
    return dict(told, job=jobs[0]["job"], status=jobs[0]) if jobs else told


if __name__ == "__main__":
    main()
