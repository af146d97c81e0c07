"""What `--dry-run` shows of a domain."""

from __future__ import annotations

import msgspec
import pytest

from qemu_blkmig.cli import show
from qemu_blkmig.job import managed_check
from qemu_blkmig.job.arrangement import Arrangement
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.place import Local
from qemu_blkmig.job.plan import Plan

XML = "<domain><devices><graphics type='vnc' passwd='{}' port='5900'/></devices></domain>"


async def test_no_password_is_shown_but_it_stays_in_what_libvirt_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    arrangement = Arrangement({}, XML.format("sesame"), XML.format("sesame"))

    async def looked(*_: object) -> tuple[Arrangement, list[Plan]]:
        return arrangement, []

    monkeypatch.setattr(managed_check, "look_at_domain", looked)
    told = await managed_check.check_managed(ManagedOptions("web1", "qemu+ssh://b/system", Local("/")))
    assert told.xml == told.persistent_xml == XML.format("***")
    assert "sesame" not in show.checked_domain(told) and b"sesame" not in msgspec.json.encode(told)
    assert arrangement.xml == XML.format("sesame")
