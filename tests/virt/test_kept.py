"""What libvirt keeps of a domain in places of its own: UEFI variables that no definition names, a TPM's state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qemu_blkmig.errors import Refused
from qemu_blkmig.virt import kept
from qemu_blkmig.virt.domain import Domain, has_varstore, nvram_of
from qemu_blkmig.virt.kept import naming_variables, own_variables, tpm_state, variables_for

SYSTEM, SESSION = "qemu:///system", "qemu+unix:///session?socket=/x"
XML = "<domain><name>web1</name>\n  <os{firmware}>\n    <type>hvm</type>{more}\n  </os><devices/></domain>"
CHOSEN = " firmware='efi'"
LOADER = "<loader type='pflash' readonly='yes'{}>/code.fd</loader>"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for UEFI variables of the system's libvirt, in which web1 has some; the user's own is elsewhere."""
    for name, place in (("_SYSTEMS_VARIABLES", "nvram"), ("_SYSTEMS_TPM_STATES", "swtpm")):
        (tmp_path / place).mkdir()
        monkeypatch.setattr(kept, name, tmp_path / place)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    (tmp_path / "nvram" / "web1_VARS.fd").touch()
    return tmp_path / "nvram"


@pytest.mark.parametrize(
    ("firmware", "more", "found"),
    [
        (CHOSEN, "", True),
        (CHOSEN, "<loader secure='yes'/>", True),
        (CHOSEN, "<loader stateless='yes'/>", False),
        (CHOSEN, "<nvram type='network'><source protocol='iscsi' name='x'/></nvram>", False),
        ("", LOADER.format(""), True),
        ("", LOADER.format(" stateless='yes'"), False),
        ("", "<loader type='rom'>/x</loader>", False),
        (" firmware='bios'", "", False),
        ("", "", False),
    ],
)
def test_variables_that_no_definition_names_lie_where_libvirt_puts_them(
    system: Path, firmware: str, more: str, found: bool
) -> None:
    domain = Domain.parse(XML.format(firmware=firmware, more=more))
    assert own_variables(domain, SYSTEM) == (str(system / "web1_VARS.fd") if found else None)
    assert own_variables(replace(domain, name="new"), SYSTEM) is None
    assert own_variables(domain, SESSION) is None


@pytest.mark.parametrize("variable", [None, "XDG_CONFIG_HOME"])
def test_those_of_a_user_s_own_libvirt_lie_in_the_user_s_configuration(
    system: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    config = system.parent / "home" / ".config"
    if variable is not None:
        config = system.parent / "elsewhere"
        monkeypatch.setenv(variable, str(config))
    place = config / "libvirt" / "qemu"
    (place / "nvram").mkdir(parents=True)
    (place / "nvram" / "web1_VARS.fd").touch()
    assert own_variables(Domain.parse(XML.format(firmware=CHOSEN, more="")), SESSION) == str(
        place / "nvram" / "web1_VARS.fd"
    )


def test_variables_that_are_named_are_those_if_they_are_there(system: Path) -> None:
    domain = Domain.parse(XML.format(firmware=CHOSEN, more=f"<nvram>{system / 'web1_VARS.fd'}</nvram>"))
    assert own_variables(replace(domain, name="other"), SESSION) == domain.nvram
    assert own_variables(replace(domain, nvram="/none.fd"), SYSTEM) is None


def test_what_nobody_may_look_at_is_not_taken_for_absent(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", stat)
    domain = Domain.parse(XML.format(firmware=CHOSEN, more=""))
    with pytest.raises(Refused, match=r"cannot tell .* in .*web1_VARS.fd: Permission denied"):
        own_variables(domain, SYSTEM)
    with pytest.raises(Refused, match=r"cannot tell .* in .*/swtpm/.*: Permission denied"):
        tpm_state(replace(domain, tpm=True, uuid="u1"), SYSTEM)


def test_where_the_destination_s_libvirt_looks_for_them_goes_by_the_name_there(system: Path) -> None:
    assert variables_for("new", "/h/me/web1_VARS.fd", SESSION, SYSTEM) == str(system / "new_VARS.fd")
    assert variables_for("new", "/h/me/web1_VARS.fd", SESSION, "qemu+ssh://b/session") == "/h/me/new_VARS.fd"
    assert variables_for("new", "/v/web1_VARS.fd", SYSTEM, "qemu+ssh://b/session") is None


@pytest.mark.parametrize("more", ["", "\n    <nvram template='/t&amp;.fd'/>"])
def test_a_definition_is_made_to_name_them_and_all_else_stays(more: str) -> None:
    xml = XML.format(firmware=CHOSEN, more=more)
    named = naming_variables(xml, "/a&b.fd")
    assert nvram_of(named) == ("/t&.fd" if more else None, "/a&b.fd")
    (line,) = set(named.splitlines()) - set(xml.splitlines())
    assert named.replace(f"{line}\n", "") == xml.replace(f"{more}\n" if more else "", "\n" if more else "")


def test_a_tpm_s_state_is_looked_for_where_the_domain_or_libvirt_has_it(system: Path) -> None:
    xml = "<domain><uuid>u1</uuid><devices><tpm><backend type='emulator'>{}</backend></tpm></devices></domain>"
    own = system.parent / "own"
    plain, named = (Domain.parse(xml.format(source)) for source in ("", f"<source type='dir' path='{own}'/>"))
    users = system.parent / "home" / ".config" / "libvirt" / "qemu" / "swtpm" / "u1"
    for place, domain, uri in (
        (system.parent / "swtpm" / "u1", plain, SYSTEM),
        (users, plain, SESSION),
        (own, named, SYSTEM),
    ):
        assert tpm_state(domain, uri) is None
        place.mkdir(parents=True)
        assert tpm_state(domain, uri) is None
        (place / "tpm2").touch()
        assert tpm_state(domain, uri) == place
        assert tpm_state(replace(domain, tpm=False), uri) is None


def test_variables_that_qemu_keeps_itself_are_seen() -> None:
    varstore = "<varstore path='/var/lib/libvirt/qemu/varstore/web1.json'/>"
    assert has_varstore(XML.format(firmware=CHOSEN, more=varstore))
    assert not has_varstore(XML.format(firmware=CHOSEN, more=""))
