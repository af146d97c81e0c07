"""AES-GCM is preferred where nobody has chosen ciphers, and the processor knows AES."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qemu_blkmig.transport import ciphers

pytestmark = pytest.mark.skipif(shutil.which("ssh") is None, reason="the system's ssh is asked")


@pytest.fixture(autouse=True)
def processor_with_aes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ciphers, "knows_aes", lambda: True)


def test_where_nobody_chose_aes_comes_first(tmp_path: Path) -> None:
    (config := tmp_path / "config").write_text("Compression no\n")
    options = ciphers.preferred_ciphers(["ssh", "-F", str(config)], ["-p", "22"], "there.example")
    assert options == ["-o", f"Ciphers={ciphers.PREFERRED}"]


@pytest.mark.parametrize("chosen", ["aes256-ctr", "-chacha20-poly1305@openssh.com", "^aes256-ctr"])
def test_what_a_configuration_chose_stays(tmp_path: Path, chosen: str) -> None:
    (config := tmp_path / "config").write_text(f"Host there.example\n Ciphers {chosen}\n")
    assert ciphers.preferred_ciphers(["ssh", "-F", str(config)], [], "there.example") == []
    assert ciphers.preferred_ciphers(["ssh", "-F", str(config)], [], "elsewhere.example") != []


@pytest.mark.parametrize("command", [["/bin/false"], ["/nonexistent/ssh"]])
def test_an_ssh_that_does_not_tell_is_left_alone(command: list[str]) -> None:
    assert ciphers.preferred_ciphers(command, [], "there.example") == []
