# Copyright (c) The qemu-blkmig developers
# GNU General Public License v2.0 or later (see COPYING or https://www.gnu.org/licenses/gpl-2.0.txt)
# SPDX-License-Identifier: GPL-2.0-or-later
"""Which domain goes to which host."""

from __future__ import annotations

from ansible_collections.qemu_blkmig.libvirt.plugins.filter.placement import placement


def domain(name, memory, *images):
    disks = [{"source": path, "allocation": size, "moves": True} for path, size in images]
    empty = {"source": None, "allocation": None, "moves": False}
    return {"name": name, "memory": memory, "disks": [*disks, empty]}


def host(memory, **available):
    """A host that has /srv and /var of one size each, on file systems of their own."""
    directories = [
        {"path": f"/{name}", "filesystem": number, "available": size}
        for number, (name, size) in enumerate(available.items())
    ]
    return {"room": {"memory": memory, "directories": directories}}


def test_each_goes_where_most_memory_is_left():
    domains = [domain("small", 1), domain("large", 6), domain("middle", 4)]
    assert placement(domains, {"b": host(10), "c": host(8)}) == {"large": "b", "middle": "c", "small": "b"}


def test_what_is_placed_takes_memory_and_storage_from_what_follows():
    domains = [domain("one", 5, ("/srv/1", 60)), domain("two", 4, ("/srv/2", 60)), domain("three", 3, ("/srv/3", 30))]
    assert placement(domains, {"b": host(100, srv=100)}) == {"one": "b", "three": "b"}
    assert placement(domains, {"b": host(8, srv=1000)}) == {"one": "b", "three": "b"}


def test_directories_on_one_file_system_share_its_room():
    shared = host(10, srv=100, var=100)
    shared["room"]["directories"][1]["filesystem"] = 0
    two = domain("two", 1, ("/srv/1", 60), ("/var/2", 60))
    assert placement([two], {"b": shared}) == {}
    assert placement([two], {"b": host(10, srv=100, var=100)}) == {"two": "b"}


def test_a_host_without_the_directory_is_not_taken():
    assert placement([domain("one", 1, ("/srv/1", 1))], {"b": host(10, var=100), "c": host(5, srv=100)}) == {"one": "c"}
    assert placement([domain("one", 1, ("/srv/1", 1))], {}) == {}
