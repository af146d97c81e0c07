"""Which address the destination is to connect to, by the user's ssh configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_blkmig.job.datapath import DataPath
from qemu_blkmig.job.datapath_made import address_of_data
from qemu_blkmig.job.place import Ssh
from qemu_blkmig.transport.route import COMMAND_VARIABLE


async def test_a_configuration_with_names_that_are_not_utf_8_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_bytes(b"Host there\n  IdentityFile /k\xff\n  HostName 127.0.0.1\n")
    monkeypatch.setenv(COMMAND_VARIABLE, f"ssh -F {tmp_path}/config")
    assert await address_of_data(DataPath(tls=True), Ssh("there", "/")) == "127.0.0.1"
