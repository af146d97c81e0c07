"""A stream's file gets its name when it is whole."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import MagicMock

import pytest

from qemu_blkmig.errors import MigrationError
from qemu_blkmig.job.options import SaveOptions
from qemu_blkmig.job.plan import Plan
from qemu_blkmig.job.streaming import StreamCarriage


@pytest.mark.parametrize("code", [None, errno.EPERM, errno.EOPNOTSUPP], ids=["links", "vfat", "others"])
@pytest.mark.parametrize("there", [False, True])
async def test_a_whole_stream_gets_its_name_also_without_hard_links_and_never_another_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None, *, there: bool
) -> None:
    if code is not None:
        monkeypatch.setattr(Path, "hardlink_to", MagicMock(side_effect=OSError(code, "no links here")))
    file, partial = tmp_path / "stream", tmp_path / "stream.incomplete"
    options = cast(SaveOptions, SimpleNamespace(to=f"file:{file}", names={}))
    carriage = StreamCarriage(cast(Plan, SimpleNamespace(disks=[])), options, None, MagicMock())
    partial.write_text("whole")
    if there:
        file.write_text("somebody else's")
        with pytest.raises(MigrationError, match="cannot be renamed"):
            carriage._name_file()
        assert file.read_text() == "somebody else's" and partial.exists()
        return
    carriage._name_file()
    assert file.read_text() == "whole" and not partial.exists()
