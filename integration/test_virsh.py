"""virsh-blkmigrate between two real libvirtd: guests that write all the time arrive, or stay, with every write."""

from __future__ import annotations

from integration.virtlab import IMAGES, Domain, VirtLab
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20


def test_a_guest_moves_and_loses_no_write(virtlab: VirtLab, domain: Domain) -> None:
    outcome = virtlab.migrate(domain, "--output", "json").succeeded()
    assert outcome.result["outcome"] == "migrated" and outcome.result["verified"] == "written"
    assert domain.state() is not None
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


def test_persistent_and_undefinesource_mean_what_they_do_with_virsh(virtlab: VirtLab, domain: Domain) -> None:
    virtlab.migrate(domain, "--persistent", "--undefinesource", "--dname", f"{domain.name}b").succeeded()
    assert domain.state() is None
    assert virtlab.hosts.domains(far=True)[f"{domain.name}b"] == "running"
    virtlab.hosts.virsh("destroy", f"{domain.name}b", far=True)
    assert virtlab.hosts.domains(far=True)[f"{domain.name}b"] == "shut off"
    virtlab.hosts.virsh("undefine", f"{domain.name}b", far=True)


def test_two_disks_go_where_they_are_told_to(virtlab: VirtLab) -> None:
    root = virtlab.disk("two-root.qcow2", 64 * MIB, data=[(0, 8 * MIB)])
    data = virtlab.disk("two-data.raw", 32 * MIB, "raw")
    domain = virtlab.boot(root, data)
    virtlab.hosts.run("mkdir", "-p", IMAGES / "elsewhere", far=True)
    elsewhere = IMAGES / "elsewhere" / "data.raw"
    virtlab.migrate(domain, "--disk", f"vdb={elsewhere}").succeeded()
    assert str(elsewhere) in virtlab.hosts.virsh("dumpxml", domain.name, far=True)
    virtlab.assert_arrived(domain, paths=[root.path, elsewhere])
    domain.destroy()


def test_ram_over_tcp_where_the_user_says(virtlab: VirtLab, domain: Domain) -> None:
    virtlab.migrate(domain, "--migrateuri", "tcp://hostb:49170", "--listen-address", "0.0.0.0").succeeded()
    virtlab.assert_arrived(domain)


def test_peer_to_peer(virtlab: VirtLab, domain: Domain) -> None:
    virtlab.migrate(domain, "--p2p", "--agent", "ssh://hostb:2222").succeeded()
    virtlab.assert_arrived(domain)


def test_a_paused_guest_stays_paused_and_no_live_pauses_it_only_on_the_way(virtlab: VirtLab, domain: Domain) -> None:
    virtlab.migrate(domain, "--no-live", "--suspend").succeeded()
    assert domain.state(far=True) == "paused"
    virtlab.hosts.virsh("resume", domain.name, far=True)
    virtlab.assert_arrived(domain)


def test_a_timeout_moves_a_guest_that_would_never_converge(virtlab: VirtLab) -> None:
    disk = virtlab.disk("busy.qcow2", 128 * MIB)
    domain = virtlab.boot(disk, orders=Orders(writer="random", rate=0))
    outcome = virtlab.migrate(
        domain, "--downtime", "1", "--on-stall", "wait", "--timeout", "5", "--timeout-suspend", "--verbose"
    ).succeeded()
    assert "--timeout has passed" in outcome.stderr
    virtlab.assert_arrived(domain)
    domain.destroy()
