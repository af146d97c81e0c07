"""What libvirt itself would refuse of a migration, asked before a byte is copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from qemu_blkmig.virt.connection import Connection, LibvirtError, libvirt
from qemu_blkmig.virt.rehearsal import NOWHERE, unfit, unreachable, would_refuse


class _Refusing:
    """A libvirt, and its domain, that gives this answer: real ones do only where a device is such."""

    def __init__(self, words: str, code: int, uri: str = "") -> None:
        self.error = LibvirtError("libvirt", words, code)
        self.uri = uri
        self.asked: list[str] = []
        self.handle = self

    async def call(self, function: Callable[..., object], *arguments: object) -> object:
        """See `Connection`."""
        return function(*arguments)

    def migrate3(self, *_: object) -> None:
        """See libvirt."""
        raise self.error

    def domainXMLToNative(self, *_: object) -> None:
        """See libvirt."""
        raise self.error

    def migrateToURI3(self, uri: str, *_: object) -> None:
        """See libvirt."""
        self.asked.append(uri)
        raise self.error


@pytest.mark.parametrize(
    ("words", "code", "passes"),
    [
        (f"unsupported scheme in migration URI {NOWHERE}", "ARGUMENT_UNSUPPORTED", True),
        ("this function is not supported by the connection driver: virDomainMigrate3", "NO_SUPPORT", True),
        ("unknown procedure: 305", "NO_SUPPORT", True),
        ("the running swtpm does not support migration with shared storage", "NO_SUPPORT", False),
        ("cannot acquire state change lock", "OPERATION_TIMEOUT", True),
        ("domain has assigned non-USB host devices", "OPERATION_INVALID", False),
    ],
)
async def test_what_libvirt_says_of_a_device_is_an_objection_and_a_call_that_it_does_not_know_is_none(
    words: str, code: str, passes: bool
) -> None:
    end = _Refusing(words, getattr(libvirt(), f"VIR_ERR_{code}"))
    refused = await would_refuse(cast("Connection", end), end, cast("Connection", end), "<domain/>")
    assert (refused is None) == passes


@pytest.mark.parametrize(
    ("uri", "words", "passes"),
    [
        ("qemu+ssh://hostb:2222/system?x=y", "unexpected qemu URI path '/blkmig-rehearsal', try qemu:///system", True),
        ("qemu+ssh://hostb/system", "Cannot recv data: Permission denied (publickey): Connection reset", False),
        ("qemu+ssh://me@hostb/session", "Cannot recv data: Permission denied (publickey): Connection reset", True),
    ],
)
async def test_whether_the_source_s_libvirt_reaches_the_other_s_is_told_by_which_of_them_objects(
    uri: str, words: str, passes: bool
) -> None:
    end = _Refusing(words, libvirt().VIR_ERR_INTERNAL_ERROR, uri)
    refused = await unreachable(cast("Connection", end), end, cast("Connection", end), "<domain/>")
    assert (refused is None) == passes
    assert end.asked in ([], [uri.replace("/system", "/blkmig-rehearsal")])


async def test_the_way_that_the_source_s_libvirt_takes_itself_is_tried_peer_to_peer(daemonless: Connection) -> None:
    domain = await daemonless.domain("test")
    refused = await unreachable(daemonless, domain, daemonless, domain.XMLDesc())
    assert refused is not None and "p2p migration is not supported" in refused.words


async def test_a_domain_that_does_not_run_is_asked_for_as_such(daemonless: Connection) -> None:
    domain = await daemonless.domain("test")
    refused = await would_refuse(daemonless, domain, daemonless, domain.XMLDesc(), offline=True)
    assert refused is not None and "offline migration is not supported" in refused.words


@pytest.mark.parametrize(
    ("code", "passes"), [("XML_ERROR", False), ("CONFIG_UNSUPPORTED", False), ("NO_SUPPORT", True), ("NO_SECRET", True)]
)
async def test_a_definition_is_unfit_by_what_is_said_of_its_xml(code: str, passes: bool) -> None:
    end = _Refusing("no", getattr(libvirt(), f"VIR_ERR_{code}"))
    assert (await unfit(cast("Connection", end), "<domain/>") is None) == passes
