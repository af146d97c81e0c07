"""What a libvirt does not offer that a domain has, by the capabilities that it tells."""

from __future__ import annotations

from typing import Any

import pytest

from qemu_blkmig.virt.acceptance import lacks, missing
from qemu_blkmig.virt.connection import Connection, libvirt
from qemu_blkmig.virt.domain import Domain
from qemu_blkmig.virt.offered import drivers_lacking, not_offered, static_labels

WHOLE = (
    "<tpm supported='yes'><enum name='backendModel'><value>passthrough</value><value>emulator</value></enum></tpm>"
    "<graphics supported='yes'><enum name='type'><value>vnc</value><value>spice</value></enum></graphics>"
    "<video supported='yes'><enum name='modelType'><value>vga</value><value>qxl</value></enum></video>"
)
POOR = (
    WHOLE.replace("<value>emulator</value>", "").replace("<value>spice</value>", "").replace("<value>qxl</value>", "")
)
NONE = "<tpm supported='no'/><graphics supported='no'/><video supported='no'/>"
OLD = "<disk supported='yes'/><graphics supported='yes'/>"
DEVICES = (
    "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm><graphics type='spice'/>"
    "<graphics type='egl-headless'/><video><model type='qxl'/></video><video><model type='bochs'/></video>"
)
TPM = (
    "the destination's QEMU or libvirt offers no emulated TPM (is swtpm installed there? a libvirt that was asked "
    "before it was may have to be restarted)"
)


def capabilities(devices: str) -> str:
    return f"<domainCapabilities><devices>{devices}</devices></domainCapabilities>"


def domain(devices: str = "", more: str = "") -> str:
    return (
        f"<domain type='kvm'><name>x</name><uuid>x</uuid>{more}<os><type arch='x86_64' machine='q35'>hvm</type></os>"
        f"<devices><emulator>/q</emulator>{devices}</devices></domain>"
    )


@pytest.mark.parametrize(
    ("offered", "told"),
    [
        (WHOLE, []),
        (OLD, []),
        (
            POOR,
            [
                TPM,
                "the destination's QEMU offers no graphics of type spice (it offers: vnc)",
                "the destination's QEMU offers no video model qxl (it offers: vga)",
            ],
        ),
        (
            NONE,
            [
                TPM,
                "the destination's QEMU offers no graphics of type spice (it offers: none)",
                "the destination's QEMU offers no video model qxl (it offers: none)",
            ],
        ),
    ],
    ids=["whole", "old", "poor", "none"],
)
def test_devices_that_the_capabilities_do_not_have_are_told(offered: str, told: list[str]) -> None:
    assert [*not_offered(capabilities(offered), domain(DEVICES))] == told


def test_who_has_no_such_device_is_told_nothing() -> None:
    tpm = "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>"
    assert not [*not_offered(capabilities(NONE), domain(tpm))]


HOST = "<capabilities><host><secmodel><model>apparmor</model></secmodel><secmodel><model>dac</model></secmodel></host>"


def label(kind: str, model: str) -> str:
    return f"<seclabel type='{kind}' model='{model}' relabel='yes'><label>x</label></seclabel>"


def test_a_static_label_of_a_security_driver_that_is_not_there_is_told() -> None:
    host = f"{HOST}</capabilities>"
    xml = domain(more=label("static", "selinux") + label("static", "dac") + label("dynamic", "smack"))
    assert static_labels(xml) == {"selinux", "dac"}
    assert [*drivers_lacking(host, xml)] == [
        "the destination has no security driver selinux, of which this domain has a static label "
        "(it has: apparmor, dac)"
    ]
    assert not [*drivers_lacking("<capabilities><host/></capabilities>", xml)], "it does not tell"
    assert static_labels(domain(more=label("static", "none"))) == set()


async def test_all_of_it_is_asked_of_the_destination(daemonless: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(_: Any, *which: object) -> str:
        assert which == ("/q", "x86_64", "q35", "kvm")
        return capabilities(POOR)

    # libvirt's own test driver knows no domain capabilities, and one security driver, testSecurity.
    monkeypatch.setattr(libvirt().virConnect, "getDomainCapabilities", told)
    there = Domain.parse(domain(DEVICES, label("static", "selinux")))
    found = await lacks(daemonless, there, None)
    assert len(found) == 4 and found[0] == TPM and "it has: testSecurity" in found[3]


async def test_the_key_of_a_tpm_s_state_is_a_secret_that_must_be_there(
    daemonless: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "c0ffee00-1111-2222-3333-444455556666"

    def lookup(_: Any, uuid: str) -> None:
        error = libvirt().libvirtError(f"no secret {uuid}")
        error.err = (libvirt().VIR_ERR_NO_SECRET, 0, "no such secret")
        raise error

    monkeypatch.setattr(libvirt().virConnect, "secretLookupByUUIDString", lookup)
    xml = domain(f"<tpm><backend type='emulator'><encryption secret='{key}'/></backend></tpm>")
    assert await missing(daemonless, xml) == [f"the destination has no secret {key}"]
