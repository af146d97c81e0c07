"""Other ways to ask for a domain's migration: as a SOURCE of qemu-blkmig, by its id, with disks past ssh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.hosts import PORT
from integration.tool import finish
from integration.virthosts import VirtHosts
from integration.virtlab import IMAGES, Domain, VirtLab
from qemu_blkmig.demo.guest import Kernel

MIB = 1 << 20


@pytest.fixture(scope="module")
def lab(virt: VirtHosts, kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[VirtLab]:
    yield VirtLab(virt, kernel, initramfs)


@pytest.fixture
def guest(lab: VirtLab, request: pytest.FixtureRequest) -> Iterator[Domain]:
    """A guest with one qcow2 disk, 8 MiB of it data."""
    domain = lab.boot(lab.disk(f"{request.node.name[:40]}.qcow2", 64 * MIB, data=[(MIB, 8 * MIB)]))
    yield domain
    domain.destroy()


def test_a_domain_is_a_source_of_qemu_blkmig_and_its_images_go_to_the_directory(lab: VirtLab, guest: Domain) -> None:
    there = IMAGES / "new"
    lab.hosts.run("mkdir", there, far=True)
    ends = [f"libvirt:{guest.name}", f"ssh://hostb:{PORT}{there}"]
    checked = finish(lab.start_tool("check", *ends, "--output", "json")).succeeded()
    image = there / guest.disks[0].path.name
    assert [disk["destination"] for disk in checked.result["disks"]] == [str(image)]
    finish(lab.start_tool("migrate", *ends)).succeeded()
    lab.assert_arrived(guest, paths=[image])
    lab.assert_nothing_left()


def test_a_domain_is_known_by_its_id_too_and_ram_goes_where_virsh_has_it(lab: VirtLab, guest: Domain) -> None:
    number = lab.hosts.virsh("domid", guest.name).strip()
    finish(lab.start(number, "--live", lab.target, "--verbose", "tcp://hostb:49171", "--listen-address", "0.0.0.0")
           ).succeeded()  # fmt: skip
    lab.assert_arrived(guest)


def test_disks_go_past_ssh_where_that_is_asked_for(lab: VirtLab, guest: Domain) -> None:
    lab.migrate(guest, "--data", "tls://").succeeded()
    lab.assert_arrived(guest)
