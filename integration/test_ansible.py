"""The Ansible collection, built and installed from its archive, on hosta: guests that write move, once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from integration.ansiblelab import LIMIT, Ansible
from integration.virtlab import Domain, VirtLab

pytestmark = pytest.mark.timeout(3 * LIMIT)

MIB = 1 << 20
CALM = {"downtime": 3000, "max_rounds": 1000}
"""A busy machine gets more than the usual downtime."""


@pytest.fixture(scope="module")
def ansible(virtlab: VirtLab, tmp_path_factory: pytest.TempPathFactory) -> Ansible:
    """Ansible on hosta, with the collection."""
    return Ansible(virtlab, tmp_path_factory.mktemp("ansible"))


def test_a_domain_moves_when_it_is_not_there_and_only_then(virtlab: VirtLab, domain: Domain, ansible: Ansible) -> None:
    image = str(domain.disks[0].path)
    wanted: dict[str, Any] = {"name": domain.name, "dest_uri": virtlab.target, **CALM}

    told = ansible.module("blkmigrate", check=True, **wanted)
    assert told["changed"] and told["action"] == "start" and told["plan"]["ready"], told
    assert told["plan"]["disks"][0]["destination"] == image
    assert told["diff"]["before"]["at"] == "qemu:///system" and told["diff"]["after"]["at"] == virtlab.target
    assert domain.runs() == ["hosta"] and not virtlab.images_there(domain)

    moved = ansible.module("blkmigrate", **wanted)
    assert moved["changed"] and (moved["here"], moved["there"]) == (None, "running"), moved
    assert moved["result"]["verified"] == "written"
    assert moved["diff"] == told["diff"], "check mode tells what happens"

    again = ansible.module("blkmigrate", **wanted)
    assert not again["changed"] and again["action"] == "none", again
    assert again["diff"]["before"] == again["diff"]["after"]
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


def test_wrong_input_a_migration_given_up_and_one_that_is_waited_for(
    virtlab: VirtLab, domain: Domain, ansible: Ansible
) -> None:
    wanted: dict[str, Any] = {"name": domain.name, "dest_uri": virtlab.target, **CALM}
    refused = ansible.module("blkmigrate", check=True, **wanted, disks=["vdz"])
    assert refused["failed"] and "vdz" in refused["msg"] and not refused["plan"]["ready"], refused
    wrong = ansible.module("blkmigrate", **{**wanted, "downtime": -5})
    assert wrong["failed"] and wrong["error"]["kind"] == "usage", wrong

    waits = {**wanted, "options": ["--switchover", "manual"], "wait": False}
    begun = ansible.module("blkmigrate", **waits)
    assert begun["action"] == "start" and begun["status"]["domain"]["name"] == domain.name, begun
    given_up = ansible.module("blkmigrate", name=domain.name, state="aborted")
    assert given_up["changed"] and given_up["job"] == begun["job"], given_up
    assert domain.runs() == ["hosta"] and not virtlab.images_there(domain)

    begun = ansible.module("blkmigrate", **waits)
    virtlab.tool("switchover", begun["job"]).succeeded()
    moved = ansible.module("blkmigrate", **wanted)
    assert moved["there"] == "running" and moved["action"] in ("attach", "none"), moved
    told = ansible.module("blkmigrate_info", name=domain.name, past=True)
    assert (begun["job"], "migrated") in [(job["job"], job["outcome"]["text"]) for job in told["jobs"]], told
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


@pytest.fixture
def guests(virtlab: VirtLab) -> Iterator[list[Domain]]:
    """Two guests on hosta."""
    booted = [virtlab.boot(virtlab.disk(f"empty{n}.qcow2", 64 * MIB, data=[(0, 4 * MIB)])) for n in range(2)]
    yield booted
    for domain in booted:
        domain.destroy()
    virtlab.put_in_order()


@pytest.mark.thorough
def test_a_host_is_emptied_past_a_guest_that_cannot_move(
    virtlab: VirtLab, guests: list[Domain], ansible: Ansible
) -> None:
    first, second = guests
    blocking = virtlab.outside(first.disks[0].path, far=True)
    blocking.mkdir()
    wanted: dict[str, Any] = {
        "empty_host_from": "hosta", "empty_host_to": "hostb", "empty_host_at_once": 2, "empty_host_options": CALM,
    }  # fmt: skip
    told = ansible.playbook("qemu_blkmig.libvirt.empty_host", **wanted)
    assert told.code == 2, told
    assert f"{second.name}: moved to hostb" in told.stdout and f"still on hosta: {first.name}" in told.stdout, told
    assert first.runs() == ["hosta"] and second.runs() == ["hostb"]
    blocking.rmdir()
    told = ansible.playbook("qemu_blkmig.libvirt.empty_host", **wanted)
    assert told.code == 0 and "no guest that is to move" in told.stdout, told
    for domain in guests:
        virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()
