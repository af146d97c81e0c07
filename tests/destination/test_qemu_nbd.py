"""Our own qemu-nbd: what its connections may be used for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_blkmig.destination import qemu_nbd


@pytest.mark.parametrize("agree", [True, False])
async def test_connections_that_may_not_agree_leave_none_to_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agree: bool
) -> None:
    """An nbdkit in the place of one that does not promise it, as QEMU's before 7.1 do not."""
    program = tmp_path / "bin" / "qemu-nbd"
    program.parent.mkdir()
    mode = "emulate" if agree else "disable"
    program.write_text(
        "#!/bin/sh\nwhile [ $1 != --socket ]; do shift; done\n"
        f'exec nbdkit --foreground --unix "$2" --filter=multi-conn memory 1M multi-conn-mode={mode}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    server = await qemu_nbd.start(str(tmp_path / "image"), "qcow2", 2)
    assert len(server.connections) == 2 and (server.spare is not None) is agree
    for connection in (*server.connections, *(server.spare or ())):
        connection.close()
    await server.stop()
