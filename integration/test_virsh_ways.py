"""Other ways to ask for a domain's migration: as a SOURCE of qemu-blkmig, by its id, with disks past ssh."""

from __future__ import annotations

from integration.hosts import PORT
from integration.virtlab import IMAGES, Domain, VirtLab


def test_a_domain_is_a_source_of_qemu_blkmig_and_its_images_go_to_the_directory(
    virtlab: VirtLab, domain: Domain
) -> None:
    there = IMAGES / "new"
    virtlab.hosts.run("mkdir", there, far=True)
    ends = [f"libvirt:{domain.name}", f"ssh://hostb:{PORT}{there}"]
    checked = virtlab.tool("check", *ends, "--output", "json").succeeded()
    image = there / domain.disks[0].path.name
    assert [disk["destination"] for disk in checked.result["disks"]] == [str(image)]
    virtlab.tool("migrate", *ends, "--downtime", 3000).succeeded()
    virtlab.assert_arrived(domain, paths=[image])
    virtlab.assert_nothing_left()


def test_a_domain_is_known_by_its_id_too_and_ram_goes_where_virsh_has_it(virtlab: VirtLab, domain: Domain) -> None:
    number = virtlab.hosts.virsh("domid", domain.name).strip()
    virtlab.virsh(
        number, "--live", virtlab.target, "--verbose", "tcp://hostb:49171", "--listen-address", "0.0.0.0"
    ).succeeded()
    virtlab.assert_arrived(domain)


def test_disks_go_past_ssh_where_that_is_asked_for(virtlab: VirtLab, domain: Domain) -> None:
    virtlab.migrate(domain, "--data", "tls://").succeeded()
    virtlab.assert_arrived(domain)
