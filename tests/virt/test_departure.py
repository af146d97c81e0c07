"""What keeps a domain from leaving, and what of it should be known."""

from __future__ import annotations

import pytest

from qemu_blkmig.virt.connection import Connection
from qemu_blkmig.virt.departure import hindrances, taken_along

PCI = "<hostdev mode='subsystem' type='pci'/>"
XML = "<domain><name>test</name><devices>{more}</devices></domain>"


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("", None),
        (PCI, None),
        ("<hostdev mode='subsystem' type='scsi'/>", "a scsi device is passed through"),
        ("<hostdev mode='capabilities' type='misc'/>", "a misc device is passed through"),
        ("<interface type='hostdev'/>", "a network device is passed through"),
        ("<interface type='hostdev'><teaming type='transient' persistent='ua-x'/></interface>", None),
        ("<filesystem><target dir='shared'/></filesystem>", "a directory of this host (shared)"),
    ],
)
async def test_devices_of_the_host_hinder_where_libvirt_does_not_migrate_them(
    daemonless: Connection, device: str, why: str | None
) -> None:
    found = await hindrances(daemonless, await daemonless.domain("test"), XML.format(more=device))
    assert len(found) == (why is not None)
    assert all(why is not None and why in each for each in found)


async def test_snapshots_hinder(daemonless: Connection) -> None:
    domain = await daemonless.domain("test")
    domain.snapshotCreateXML("<domainsnapshot><name>before</name></domainsnapshot>")
    (found,) = await hindrances(daemonless, domain, XML.format(more=""))
    assert "no domain with snapshots, and it has 1" in found


async def test_a_saved_state_hinders_a_domain_that_does_not_run(daemonless: Connection) -> None:
    xml = "<domain type='test'><name>saved</name><memory>4096</memory><os><type>hvm</type></os></domain>"
    domain = daemonless.handle.defineXML(xml)
    assert await hindrances(daemonless, domain, xml, runs=False) == []
    domain.create()
    domain.managedSave()
    (found,) = await hindrances(daemonless, domain, xml, runs=False)
    domain.managedSaveRemove()
    assert "its state was saved here" in found and "managedsave-remove" in found


def test_what_is_another_at_the_destination_is_told() -> None:
    (told,) = taken_along(XML.format(more=PCI))
    assert "pci device" in told
