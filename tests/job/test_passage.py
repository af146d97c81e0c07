"""What libvirt's migration under way says of itself, when it ends while its QEMU is gone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import Any, cast

import pytest

from qemu_blkmig.errors import LibvirtFailed
from qemu_blkmig.job.passage import Passage, not_migrated
from qemu_blkmig.virt.connection import LibvirtError, LibvirtGone, libvirt


class _Gone:
    """A QEMU's events, and a migration, over which the libvirt has gone."""

    async def get(self) -> None:
        raise LibvirtGone("the source's libvirt is gone")

    async def failed(self) -> LibvirtGone:
        return LibvirtGone("the source's libvirt is gone")


async def test_a_libvirt_that_is_gone_is_told_once() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    gone = cast(Any, _Gone())
    with pytest.raises(LibvirtFailed, match="could not migrate the guest: the source's libvirt is gone"):
        await Passage(gone, gone, gone, contextlib.AsyncExitStack()).status()
    await asyncio.sleep(0.01)
    gc.collect()
    assert complaints == []


def test_which_libvirt_could_not_is_not_told_where_it_is_not_known() -> None:
    told = str(not_migrated(LibvirtError("the source's libvirt", "Hook script execution failed\n", 42), None))
    assert told == "libvirt, here or at the destination, could not migrate the guest: Hook script execution failed"


def test_xml_that_was_refused_is_not_to_be_tried_again_as_it_is() -> None:
    refused = LibvirtError("the source's libvirt", "unsupported configuration", libvirt().VIR_ERR_CONFIG_UNSUPPORTED)
    told = not_migrated(refused, "give other XML")
    assert told.advice == "give other XML" and told.lasting
    told = not_migrated(LibvirtError("the source's libvirt", "no", 42), "give other XML")
    assert told.advice is None and not told.lasting
    assert not_migrated(refused, None).lasting, "what the next attempt makes of the same domain is no other XML"


def test_a_libvirt_that_was_busy_with_the_domain_is_told_from_one_that_objects() -> None:
    words, module = "cannot acquire state change lock (held by monitor=remoteDispatchDomainCoreDump)", libvirt()
    assert not_migrated(LibvirtError("the source's libvirt", words, module.VIR_ERR_OPERATION_TIMEOUT), None).busy
    assert not not_migrated(LibvirtError("the source's libvirt", words, module.VIR_ERR_OPERATION_FAILED), None).busy
