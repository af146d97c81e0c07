"""What libvirt keeps of a domain in places of its own, without a word of it in the definition: UEFI variables and the
state of an emulated TPM.

Read in libvirt 9.0: with firmware that it chooses (<os firmware='efi'>) only the XML of a running domain names the file
of the variables; qemuDomainNVRAMPathFormat names it anew at each start, by the domain's name. Later ones define it. A
user's own daemon has its places below that user's configuration (virQEMUDriverConfigNew).
"""

from __future__ import annotations

import os
import posixpath
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from qemu_blkmig.errors import Refused
from qemu_blkmig.virt.domain import Domain, keeps_variables, rooted
from qemu_blkmig.virt.places import places

_SYSTEMS_VARIABLES = Path("/var/lib/libvirt/qemu/nvram")
_SYSTEMS_TPM_STATES = Path("/var/lib/libvirt/swtpm")


def is_session(uri: str) -> bool:
    """Whether a libvirt's URI is that of a user's own daemon."""
    return urlsplit(uri).path == "/session"


def own_variables(domain: Domain, uri: str) -> str | None:
    """Where the UEFI variables of a domain of this host's lie: as it says, else where the libvirt of `uri` keeps them.

    None where it has none (yet). Raises `Refused` where that cannot be told.
    """
    if domain.nvram is not None:
        return domain.nvram if is_there(Path(domain.nvram)) else None
    places_of_it = _of_the_user("nvram") if is_session(uri) else [_SYSTEMS_VARIABLES]
    files = [place / _file_of(domain.name) for place in places_of_it] if keeps_variables(domain.xml) else []
    return next((str(file) for file in files if is_there(file)), None)


def variables_for(name: str, here: str, source_uri: str, target_uri: str) -> str | None:
    """Where the destination's libvirt keeps the UEFI variables of a domain of this `name`, which lie `here`.

    None: that is unknown, for its user is not one of this host's.
    """
    if not is_session(target_uri):
        return str(_SYSTEMS_VARIABLES / _file_of(name))
    return posixpath.join(posixpath.dirname(here), _file_of(name)) if is_session(source_uri) else None


def naming_variables(xml: str, path: str) -> str:
    """The XML of a domain with UEFI variables, whose file it does not name, naming this one; all else byte for byte."""
    text = xml.encode()
    nvram = rooted(xml).find("./os/nvram")
    if nvram is not None:
        ((begin, end),) = places(text, "domain/os/nvram")
        nvram.text, nvram.tail = path, None
        return (text[:begin] + ElementTree.tostring(nvram) + text[end:]).decode()
    ((begin, end),) = places(text, "domain/os")
    at = text.rindex(b"</", begin, end)
    return (text[:at] + f"  <nvram>{escape(path)}</nvram>\n  ".encode() + text[at:]).decode()


def tpm_state(domain: Domain, uri: str) -> Path | None:
    """Where the emulated TPM of a domain of this host's has its state, if it has one.

    Raises `Refused` where that cannot be told.
    """
    if not domain.tpm:
        return None
    states = _of_the_user("swtpm") if is_session(uri) else [_SYSTEMS_TPM_STATES]
    known = [each / domain.uuid for each in states] if domain.tpm_state is None else [Path(domain.tpm_state)]
    return next((place for place in known if is_there(place) and not _is_empty(place)), None)


def is_there(path: Path) -> bool:
    """Raises `Refused` where nobody may know, as in another user's directory."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _untold(path, error) from error
    return True


def _is_empty(place: Path) -> bool:
    try:
        return place.is_dir() and not any(place.iterdir())
    except OSError as error:
        raise _untold(place, error) from error


def _untold(path: Path, error: OSError) -> Refused:
    return Refused(
        f"cannot tell whether the domain has a state in {path}: {error.strerror}", advice="run this command as root"
    )


def _file_of(name: str) -> str:
    return f"{name}_VARS.fd"


def _of_the_user(kind: str) -> list[Path]:
    """By the user's environment, which may not be the daemon's, and without it."""
    homes = [Path(os.environ.get("XDG_CONFIG_HOME") or "/"), Path.home() / ".config"]
    return [home / "libvirt" / "qemu" / kind for home in homes]
