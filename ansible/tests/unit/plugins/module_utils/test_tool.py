# Copyright (c) The qemu-blkmig developers
# GNU General Public License v2.0 or later (see COPYING or https://www.gnu.org/licenses/gpl-2.0.txt)
# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line as the modules hear it: results, errors, and what is neither; and virsh's answers."""

from __future__ import annotations

import json
import stat

import pytest
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.tool import Tool
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.trouble import Trouble
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.virsh import Virsh

ERROR = {
    "exit_code": 1, "kind": "destination-write", "what": "no space", "disk": "vda", "state": "the guest runs here",
    "advice": "make room", "suspended": "9f9f",
}  # fmt: skip
XML = """
<domain>
  <name>web1</name><uuid>u-1</uuid><memory unit='KiB'>2048</memory>
  <devices>
    <disk type='file' device='disk'><source file='/srv/a b.qcow2'/><target dev='vda'/></disk>
    <disk type='block' device='disk'><source dev='/dev/vg/data'/><target dev='vdb'/></disk>
    <disk type='volume' device='disk'><source pool='fast' volume='c'/><target dev='vdc'/></disk>
    <disk type='file' device='disk'><source file='/srv/ro'/><target dev='vdd'/><readonly/></disk>
    <disk type='network' device='disk'><source protocol='rbd' name='pool/e'/><target dev='vde'/></disk>
    <disk type='file' device='cdrom'><target dev='sda'/></disk>
  </devices>
</domain>
"""


class Module:
    """Runs scripts in the place of the commands."""

    def __init__(self, folder, told="", code=0, complaint=""):
        self.commands = []
        self._answer = code, told, complaint
        self._folder = folder
        for name in ("qemu-blkmig", "virsh-blkmigrate"):
            script = folder / name
            (folder / "told").write_text(told)
            script.write_text(f"#!/bin/sh\ncat {folder}/told; echo {complaint} >&2; exit {code}\n")
            script.chmod(stat.S_IRWXU)

    def get_bin_path(self, name, required):
        return str(self._folder / name)

    def run_command(self, command, environ_update=None):
        self.commands.append(command)
        return self._answer


def test_a_result_is_returned(tmp_path):
    run = Tool(Module(tmp_path, json.dumps({"job": "1a2b"}))).begin([])
    assert run.result() == {"job": "1a2b"}
    assert run.under_way(list) is None


def test_an_error_tells_what_happened_how_things_stand_and_what_to_do(tmp_path):
    with pytest.raises(Trouble) as trouble:
        Tool(Module(tmp_path, json.dumps({"error": ERROR}), code=1)).begin([]).result()
    assert trouble.value.what == "disk vda: no space; now: the guest runs here; next: make room"
    assert trouble.value.facts == {"error": ERROR, "job": "9f9f"}


def test_what_is_no_result_tells_what_was_said_instead(tmp_path):
    with pytest.raises(Trouble, match="gave no result: killed by somebody"):
        Tool(Module(tmp_path, "", code=137, complaint="killed by somebody")).begin([]).result()


def test_a_plan_that_is_not_ready_is_returned_with_the_failure(tmp_path):
    plan = {"ready": False, "problems": ["no room", "no such disk"], "disks": []}
    with pytest.raises(Trouble, match="the preflight refuses: no room; no such disk") as trouble:
        Tool(Module(tmp_path, json.dumps(plan), code=3)).plan([])
    assert trouble.value.facts["plan"] == plan


def test_only_a_domains_own_jobs_are_its(tmp_path):
    jobs = [{"job": "1", "domain": None}, {"job": "2", "domain": {"name": "web1", "uuid": "u-1"}}]
    jobs.append({"job": "3", "domain": {"name": "web10", "uuid": "u-2"}})
    tool = Tool(Module(tmp_path, json.dumps({"jobs": jobs})))
    assert [job["job"] for job in tool.jobs_of("web1")] == [job["job"] for job in tool.jobs_of("u-1")] == ["2"]


def test_following_ends_with_how_the_job_stands_last(tmp_path):
    lines = [json.dumps({"state": "running"}), json.dumps({"state": "finished"})]
    assert Tool(Module(tmp_path, "\n".join(lines))).follow("1a2b") == {"state": "finished"}


def test_which_disks_move_is_told_from_the_xml(tmp_path):
    domain = Virsh(Module(tmp_path, XML), "qemu:///system").domain("web1")
    assert (domain["name"], domain["uuid"], domain["memory"]) == ("web1", "u-1", 2048 * 1024)
    found = {disk["target"]: (disk["source"], disk["moves"]) for disk in domain["disks"]}
    assert found == {
        "vda": ("/srv/a b.qcow2", True),
        "vdb": ("/dev/vg/data", True),
        "vdc": ("fast/c", True),
        "vdd": ("/srv/ro", False),
        "vde": ("pool/e", False),
        "sda": (None, False),
    }


def test_a_domain_that_is_not_there_is_told_apart_from_a_libvirt_that_is_not(tmp_path):
    missing = "error: failed to get domain 'web1'"
    assert Virsh(Module(tmp_path, code=1, complaint=missing), "qemu:///system").domain("web1") is None
    with pytest.raises(Trouble, match="qemu:///system: failed to connect"):
        Virsh(Module(tmp_path, code=1, complaint="error: failed to connect"), "qemu:///system").domain("web1")


def test_sizes_are_told_by_target(tmp_path):
    table = " Target   Capacity   Allocation   Physical\n vda   100   60   50\n vdb   -   -   -\n"
    assert Virsh(Module(tmp_path, table), "qemu:///system").sizes("web1") == {
        "vda": {"capacity": 100, "allocation": 60}
    }
