"""Installing the hook: beside others, around others, and away again as if it had never been there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest

from qemu_blkmig.destination import ownership
from qemu_blkmig.errors import Refused
from qemu_blkmig.hooks import guard, install
from qemu_blkmig.hooks.expected import Expected
from tests.hooks.conftest import UUID, Host

OTHER = """#!/bin/sh
echo "$@" >> "$0.called"
[ "$2" = migrate ] && exec sed s/web1/renamed/
[ "$2" = prepare ] && [ -e "$0.no" ] && { echo "the other says no" >&2; exit 7; }
exit 0
"""


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A hook of somebody else, in a folder without ours."""
    hook = tmp_path / "etc" / "qemu"
    hook.parent.mkdir()
    hook.write_text(OTHER)
    hook.chmod(0o750)
    return hook


def test_beside_another_hook_nothing_of_it_changes(other: Path) -> None:
    standing = install.install(other.parent, way="directory")
    assert standing.installed and standing.current and standing.others == [str(other)] and not standing.notes
    assert standing.path == str(other.parent / "qemu.d" / "50-qemu-blkmig")
    assert other.read_text() == OTHER
    assert install.install(other.parent, way="directory") == standing
    assert not install.remove(other.parent).installed
    assert list(other.parent.iterdir()) == [other] and other.read_text() == OTHER


def test_where_libvirt_takes_one_hook_the_other_runs_first_and_comes_back(host: Host, other: Path) -> None:
    install.install(other.parent, way="chain")
    standing = install.install(other.parent, way="chain")
    aside = other.parent / "qemu.before-qemu-blkmig"
    assert (standing.path, standing.before, standing.others) == (str(other), str(aside), [])
    called = Path(f"{aside}.called")
    for operation in ("prepare", "stopped"):
        assert host.call(operation, hook=[other]).returncode == 0
    assert called.read_text() == "web1 prepare begin -\nweb1 stopped end -\n"
    ownership.move(str(host.image), "1", "vda", "hostb:/b")
    assert host.call("prepare", hook=[other]).returncode == 1
    no = Path(f"{aside}.no")
    no.touch()
    done = host.call("prepare", hook=[other])
    assert (done.returncode, done.stderr) == (7, b"the other says no\n")
    for path in (no, called):
        path.unlink()
    assert not install.remove(other.parent).installed
    assert list(other.parent.iterdir()) == [other] and other.read_text() == OTHER and os.access(other, os.X_OK)


def test_what_the_other_hook_makes_of_the_xml_is_kept_and_rewritten_further(host: Host, other: Path) -> None:
    install.install(other.parent, way="chain")
    xml = host.xml("/old")
    renamed = xml.replace(b"web1", b"renamed")
    assert host.call("migrate", xml, hook=[other]).stdout == renamed
    held = Expected("j1", UUID, "web1", "hosta", {"vda": "/new"})
    assert host.call("migrate", xml, hook=[other]).stdout == renamed.replace(b"/old", b"/new")
    held.close()


def test_a_link_to_a_hook_elsewhere_comes_back_as_a_link(other: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    other.rename(real)
    other.symlink_to(real)
    install.install(other.parent, way="chain")
    assert real.read_text() == OTHER and not other.is_symlink()
    install.remove(other.parent)
    assert other.readlink() == real and real.read_text() == OTHER


def test_a_hook_that_was_set_aside_before_is_not_overwritten(other: Path) -> None:
    aside = other.parent / "qemu.before-qemu-blkmig"
    aside.write_text("dear")
    with pytest.raises(Refused, match="in the way"):
        install.install(other.parent, way="chain")
    assert aside.read_text() == "dear" and other.read_text() == OTHER


def test_a_hook_that_does_not_run_here_is_not_installed(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_interpreter", lambda: "/bin/false")
    ways: tuple[Literal["chain", "directory"], ...] = ("chain", "directory")
    for way in ways:
        with pytest.raises(Refused, match="does not run here"):
            install.install(other.parent, way=way)
        assert other.read_text() == OTHER
        assert [path for path in other.parent.iterdir() if path.is_file()] == [other]


def test_an_old_version_is_told_and_brought_up_to_date(tmp_path: Path) -> None:
    standing = install.install(tmp_path, way="directory")
    assert any("reload" in note for note in standing.notes)
    hook = Path(standing.path or "")
    hook.write_text(hook.read_text() + "# older\n")
    assert not install.status(tmp_path).current
    assert install.install(tmp_path, way="chain").current
    assert hook.exists()


def test_another_state_directory_is_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_BLKMIG_STATE_DIR", "/somewhere/else")
    assert any("/somewhere/else" in note for note in install.status(host.hooks).notes)


def test_guard_says_the_same_without_libvirt(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    definitions = host.folder / "definitions"
    definitions.mkdir()
    (definitions / "web1.xml").write_bytes(b"<!-- kept by libvirt -->" + host.xml())
    (definitions / "broken.xml").write_text("<")
    monkeypatch.setattr(guard, "DEFINITIONS", (definitions,))
    for name in ("web1", UUID, UUID.upper()):
        assert guard.check(guard.definition(name)).uuid == UUID
    ownership.move(str(host.image), "1", "vda", "hostb:/b")
    with pytest.raises(Refused, match="moved its guest away"):
        guard.check(guard.definition(UUID))
    with pytest.raises(Refused, match="no domain web2"):
        guard.definition("web2")
    running = b"<domstatus state='running'><monitor/>" + host.xml() + b"</domstatus>"
    with pytest.raises(Refused, match="hostb:/b"):
        guard.check(running)
