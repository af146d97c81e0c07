"""virsh-blkmigrate between two real libvirtd: guests that write all the time arrive, or stay, with every write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.virthosts import VirtHosts
from integration.virtlab import IMAGES, Domain, VirtLab
from qemu_blkmig.demo.guest import Kernel, Orders

MIB = 1 << 20


@pytest.fixture(scope="module")
def lab(virt: VirtHosts, kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[VirtLab]:
    yield VirtLab(virt, kernel, initramfs)


@pytest.fixture
def guest(lab: VirtLab, request: pytest.FixtureRequest) -> Iterator[Domain]:
    """A guest with one qcow2 disk, 16 MiB of it data."""
    name = f"{abs(hash(request.node.name))}.qcow2"
    domain = lab.boot(lab.disk(name, 128 * MIB, data=[(MIB, 16 * MIB)]))
    yield domain
    domain.destroy()


def test_a_guest_moves_and_loses_no_write(lab: VirtLab, guest: Domain) -> None:
    outcome = lab.migrate(guest, "--output", "json").succeeded()
    assert outcome.result["outcome"] == "migrated" and outcome.result["verified"] == "written"
    assert guest.state() is not None
    lab.assert_arrived(guest)
    lab.assert_nothing_left()


def test_persistent_and_undefinesource_mean_what_they_do_with_virsh(lab: VirtLab, guest: Domain) -> None:
    lab.migrate(guest, "--persistent", "--undefinesource", "--dname", f"{guest.name}b").succeeded()
    assert guest.state() is None
    assert lab.hosts.domains(far=True)[f"{guest.name}b"] == "running"
    lab.hosts.virsh("destroy", f"{guest.name}b", far=True)
    assert lab.hosts.domains(far=True)[f"{guest.name}b"] == "shut off"
    lab.hosts.virsh("undefine", f"{guest.name}b", far=True)


def test_two_disks_go_where_they_are_told_to_and_a_cdrom_and_a_read_only_disk_stay(lab: VirtLab) -> None:
    root, data = lab.disk("two-root.qcow2", 64 * MIB, data=[(0, 8 * MIB)]), lab.disk("two-data.raw", 32 * MIB, "raw")
    domain = lab.boot(root, data)
    lab.hosts.run("mkdir", "-p", IMAGES / "elsewhere", far=True)
    elsewhere = IMAGES / "elsewhere" / "data.raw"
    lab.migrate(domain, "--disk", f"vdb={elsewhere}").succeeded()
    assert str(elsewhere) in lab.hosts.virsh("dumpxml", domain.name, far=True)
    lab.assert_arrived(domain, paths=[root.path, elsewhere])
    domain.destroy()


def test_ram_over_tcp_where_the_user_says(lab: VirtLab, guest: Domain) -> None:
    lab.migrate(guest, "--migrateuri", "tcp://hostb:49170", "--listen-address", "0.0.0.0").succeeded()
    lab.assert_arrived(guest)


def test_peer_to_peer(lab: VirtLab, guest: Domain) -> None:
    lab.migrate(guest, "--p2p", "--agent", "ssh://hostb:2222").succeeded()
    lab.assert_arrived(guest)


def test_a_paused_guest_stays_paused_and_no_live_pauses_it_only_on_the_way(lab: VirtLab, guest: Domain) -> None:
    lab.migrate(guest, "--no-live", "--suspend").succeeded()
    assert guest.state(far=True) == "paused"
    lab.hosts.virsh("resume", guest.name, far=True)
    lab.assert_arrived(guest)


def test_a_timeout_moves_a_guest_that_would_never_converge(lab: VirtLab) -> None:
    disk = lab.disk("busy.qcow2", 128 * MIB)
    domain = lab.boot(disk, orders=Orders(writer="random", rate=0))
    outcome = lab.migrate(
        domain, "--downtime", "1", "--on-stall", "wait", "--timeout", "5", "--timeout-suspend", "--verbose"
    ).succeeded()
    assert "--timeout has passed" in outcome.stderr
    lab.assert_arrived(domain)
    domain.destroy()
