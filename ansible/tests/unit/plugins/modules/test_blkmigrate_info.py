# Copyright (c) The qemu-blkmig developers
# GNU General Public License v2.0 or later (see COPYING or https://www.gnu.org/licenses/gpl-2.0.txt)
# SPDX-License-Identifier: GPL-2.0-or-later
"""What is told of a host's domains."""

from __future__ import annotations

from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.trouble import Trouble
from ansible_collections.qemu_blkmig.libvirt.plugins.modules.blkmigrate_info import look


class Virsh:
    """Has two domains, of which one lacks an image: virsh domblkinfo fails then, also with --all."""

    def names(self):
        return ["broken", "web1"]

    def domain(self, name):
        return {"name": name, "disks": [{"target": "vda"}]}

    def sizes(self, name):
        if name == "broken":
            raise Trouble("Failed to open file '/gone': No such file or directory")
        return {"vda": {"capacity": 100, "allocation": 60}}


def test_a_domain_that_lacks_an_image_does_not_keep_the_others_from_being_told():
    broken, sound = look(Virsh(), None)
    assert broken["disks"] == [{"target": "vda", "capacity": None, "allocation": None}]
    assert sound["disks"] == [{"target": "vda", "capacity": 100, "allocation": 60}]
