#!/usr/bin/python3 -IS
"""libvirt's hook of qemu-blkmig: keeps libvirt from starting a guest on images that are incomplete, or old.

Installed as /etc/libvirt/hooks/qemu or into qemu.d/ (`qemu-blkmig hooks install`, or `cp`): so it is one file, uses the
standard library only, and imports costly modules late; it is to end within 50 ms, and never calls libvirt, which waits.
libvirt runs it as `qemu DOMAIN OPERATION SUB EXTRA` with the domain's XML on stdin (https://libvirt.org/hooks.html; the
order of operations was seen with 9.0). Of a migration that comes in the destination sees migrate, prepare, start,
started (begin); of every other start the same without migrate; of every end stopped, release (end).

    prepare, start begin   refused if an ownership record says that an image is incoming, or moved away
    migrate begin          an expected domain's disks get the sources that its job chose; it may then start once, on
                           images that are incoming by that very job
    stopped, release end   noted for the job that expects, or sends, the domain; with the end that is forgotten

Nothing else is touched: without anything to say it prints nothing, which libvirt takes for "as it was".
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
import time

TYPE_CHECKING = False
"""As typing's, which takes 12 ms to import."""
if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Mapping
    from typing import Any, NoReturn

STATE = "/var/lib/qemu-blkmig"
"""The state directory, where `hooks install` finds another one it is written here."""
BEFORE = ""
"""The hook that was there before, and is run first, where libvirt takes one only."""

POOLS = ("/run/libvirt/storage", "/etc/libvirt/storage")
"""Where libvirt keeps the XML of pools that run, and of those that are defined."""
RECORD_VERSION = 1
STATES = ("incoming", "complete", "moved")
EXPECTED_VERSION = 1
ARRIVAL = 120.0
"""Seconds from `migrate begin` in which `start begin` of the same domain counts as part of that migration."""
_TAG = rb"<[^\s/>]+(?:\s+[^\s=]+\s*=\s*(?:'[^']*'|\"[^\"]*\"))*\s*/?>"
_PLACE = rb"\s+(?:file|dev|pool|volume|mode|type)\s*=\s*(?:'[^']*'|\"[^\"]*\")"


class Damaged(ValueError):
    """A file that cannot be understood; the text names it."""


class Refusal(Exception):
    """Why the domain is not to start: lines for the administrator."""


class Disk:
    """A <disk> of a domain's XML: what libvirt would open, and where in the XML that is written.

    `images`: the top one first, then its backing files as far as they are told; "" where it is no file or device.
    """

    def __init__(self, kind: str, begin: int) -> None:
        self.kind = kind
        self.target = ""
        self.images: list[str] = []
        self.read_only = False
        self.begin = begin
        self.source: int | None = None
        self.backing: tuple[int, int] | None = None


class Domain:
    """What the hook needs to know of a domain's XML. Raises `Damaged`."""

    def __init__(self, xml: bytes) -> None:
        from xml.parsers import expat

        self.name = self.uuid = ""
        self.disks: list[Disk] = []
        self._path: list[str] = []
        self._xml = xml
        self._parser = expat.ParserCreate()
        self._parser.StartElementHandler = self._begin
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        try:
            self._parser.Parse(xml, True)
        except expat.ExpatError as error:
            raise Damaged(f"the domain's XML cannot be read: {error}") from error

    def _begin(self, tag: str, attributes: dict[str, str]) -> None:
        # The XML of a running domain, as libvirt keeps it, lies within a <domstatus>.
        if self._path or tag == "domain":
            self._path.append(tag)
        path = "/".join(self._path)
        at = self._parser.CurrentByteIndex
        if path == "domain/devices/disk":
            self.disks.append(Disk(attributes.get("type", "file"), at))
        elif path.startswith("domain/devices/disk/"):
            self._begin_in_disk(self.disks[-1], self._path[3:], attributes, at)

    def _begin_in_disk(self, disk: Disk, path: list[str], attributes: dict[str, str], at: int) -> None:
        if path == ["target"]:
            disk.target = attributes.get("dev", "")
        elif path == ["readonly"]:
            disk.read_only = True
        elif path == ["backingStore"]:
            disk.backing = (at, at)
        elif path[-1] == "source" and set(path[:-1]) <= {"backingStore"}:
            if len(path) == 1:
                disk.source = at
            image = attributes.get("file") or attributes.get("dev") or ""
            if "volume" in attributes:
                image = volume_path(attributes.get("pool", ""), attributes["volume"])
            disk.images.append(image)

    def _end(self, _tag: str) -> None:
        if self._path[3:] == ["backingStore"] and self._path[:3] == ["domain", "devices", "disk"]:
            at = self._parser.CurrentByteIndex
            begin, _ = self.disks[-1].backing or (at, at)
            # Of an empty element (<a/>) expat tells the end, of others the begin of the end tag.
            tag = _start_tag(self._xml, begin)
            end = tag.end() if tag[0].endswith(b"/>") else self._xml.index(b">", at) + 1
            self.disks[-1].backing = (begin, end)
        if self._path:
            self._path.pop()

    def _text(self, text: str) -> None:
        if self._path == ["domain", "name"]:
            self.name += text
        elif self._path == ["domain", "uuid"]:
            self.uuid += text.strip().lower()


def volume_path(pool: str, volume: str) -> str:
    """The path of a pool's volume, by the XML that libvirt keeps of the pool; "" where that is not told."""
    import html
    import re

    for place in POOLS:
        try:
            with open(f"{place}/{pool}.xml", encoding="utf-8") as file:
                found = re.search(r"<target>\s*<path>([^<]*)</path>", file.read())
        except OSError:
            continue
        if found:
            return os.path.join(html.unescape(found[1]), volume)
    return ""


def record_path(image: str, state: str) -> str:
    """Where the ownership record of an image file or block device is, or would be."""
    real = os.path.realpath(image)
    try:
        block = stat.S_ISBLK(os.stat(real).st_mode)
    except OSError:
        block = False
    if block:
        return _path_of_device(image, real, os.path.join(state, "devices"))
    folder, name = os.path.split(real)
    return os.path.join(folder, f".{name}.blkmig")


def _path_of_device(image: str, real: str, devices: str) -> str:
    """A device has many names, and links to it come and go: one record, whichever name it was written under."""
    from urllib.parse import quote

    try:
        names = sorted(name for name in os.listdir(devices) if name.endswith(".blkmig"))
    except OSError:
        names = []
    for name in names:
        place = os.path.join(devices, name)
        try:
            told = _load(place)
        except (OSError, ValueError):
            continue
        if isinstance(told, dict) and os.path.realpath(str(told.get("image", ""))) == real:
            return place
    return os.path.join(devices, f"{quote(image, safe='')}.blkmig")


def read_record(place: str) -> dict[str, Any] | None:
    """The ownership record at `place` (destination/ownership.py); None: there is none. Raises `Damaged`, `OSError`."""
    try:
        told = _load(place)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Damaged(f"the ownership record {place} cannot be read: {error}") from error
    return understood(told, place)


def understood(told: object, place: str) -> dict[str, Any]:
    """A record's fields, checked. Raises `Damaged`."""
    if not isinstance(told, dict) or told.get("version") != RECORD_VERSION or told.get("state") not in STATES:
        raise Damaged(f"the ownership record {place} is of a form that is not known here")
    record = {name: told.get(name) for name in ("state", "job", "disk", "image", "peer", "when")}
    if not all(isinstance(word, str) for word in record.values()):
        raise Damaged(f"the ownership record {place} lacks something")
    for name, kind in (("before", dict), ("domain", str), ("uuid", str)):
        record[name] = told[name] if isinstance(told.get(name), kind) else None
    return record


def tell(record: Mapping[str, Any]) -> str:
    """In words, what a record means for whoever wants to use the image."""
    image, job, peer, when = (record[name] for name in ("image", "job", "peer", "when"))
    domain = f" domain {record['domain']}" if record["domain"] else ""
    if record["state"] == "incoming":
        return (
            f"{image} is incomplete: job {job} was filling it{' for' + domain if domain else ''} from {peer} ({when})"
        )
    if record["state"] == "moved":
        return f"{image} is old: job {job} moved {domain.strip() or 'its guest'} away to {peer} ({when})"
    return f"{image} was filled completely by job {job} from {peer} ({when})"


def expected_path(state: str, uuid: str) -> str:
    """Where it is written that a domain is expected from another host, or sent to one."""
    return os.path.join(state, "domains", f"{uuid}.json")


def log_path(state: str, job: str) -> str:
    """Where the hook notes what libvirt did with the domain of a job: JSON, a line each."""
    return os.path.join(state, "domains", f"{job}.log")


def read_expected(state: str, uuid: str) -> dict[str, Any] | None:
    """What a job told of the domain (hooks/expected.py), with `alive`: its process lives, and holds the file's lock.

    None: nothing. Raises `Damaged`, `OSError`.
    """
    place = expected_path(state, uuid)
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            alive = False
        except BlockingIOError:
            alive = True
        told = _load(place)
    except ValueError as error:
        raise Damaged(f"{place} cannot be read: {error}") from error
    finally:
        os.close(descriptor)
    if not isinstance(told, dict) or told.get("version") != EXPECTED_VERSION:
        raise Damaged(f"{place} is of a form that is not known here")
    words, disks = [told.get(name) for name in ("job", "uuid", "name", "peer")], told.get("disks")
    if not isinstance(disks, dict) or not all(isinstance(word, str) for word in [*words, *disks.values()]):
        raise Damaged(f"{place} lacks something")
    return {**told, "alive": alive}


def troubles(domain: Domain, state: str, arriving: str | None = None) -> list[str]:
    """Why the domain must not start, with what to do. `arriving`: the job whose migration brings it just now."""
    found = []
    for disk in domain.disks:
        for layer, image in enumerate(disk.images):
            if not image.startswith("/"):
                continue
            place = record_path(image, state)
            try:
                record = read_record(place)
            except (OSError, Damaged) as error:
                if os.path.lexists(place):
                    found.append(
                        f"disk {disk.target}: {error}\n  next: look at {place}; it says whether {image} is complete. "
                        f"If you know that it is, and that its guest runs nowhere else: rm {_quoted(place)}"
                    )
                continue
            if record is None or record["state"] == "complete":
                continue
            if record["state"] == "incoming" and record["job"] == arriving:
                continue
            # The image of a guest that has moved may still be the base of others, or be read by them.
            if record["state"] == "moved" and (layer or disk.read_only):
                continue
            found.append(f"disk {disk.target}: {tell(record)}\n  record: {place}\n  next: {_advice(record, place)}")
    return found


def _advice(record: Mapping[str, Any], place: str) -> str:
    host, colon, _ = record["peer"].partition(":")
    host = host if colon and host else "the other host"
    if record["state"] == "incoming":
        return (
            f"unless somebody has moved it otherwise, the guest is still that of {host}: let it run there. "
            f"On {host}, `qemu-blkmig status {record['job']}` tells how the job stands, "
            f"`qemu-blkmig cleanup {record['job']}` ends one that was left behind. "
            f"Only if you know that the image is complete: rm {_quoted(place)}"
        )
    name = record["domain"] or "the guest"
    return (
        f"start {name} on {host}, where it is now (`virsh list --all` there). Only if you want it back as it was "
        f"here before it moved, and it will never run on {host} again: rm {_quoted(place)}"
    )


def rewritten(xml: bytes, domain: Domain, sources: Mapping[str, str]) -> bytes:
    """The XML with these disks' sources (path by target) put in place, all else byte for byte. Raises `Refusal`."""
    edits: list[tuple[int, int, bytes]] = []
    for target, path in sources.items():
        disk = next((disk for disk in domain.disks if disk.target == target), None)
        if disk is None or disk.source is None:
            raise Refusal(f"the job brings disk {target}, which this domain's XML does not have")
        if disk.images[:1] == [path] and disk.kind in ("file", "block"):
            continue
        kind = "block" if _is_block(path) else "file"
        edits.append(_moved_to(xml, disk.begin, "type", kind))
        edits.append(_moved_to(xml, disk.source, "dev" if kind == "block" else "file", path))
        if disk.backing is not None:
            # libvirt finds the chain by itself, from the images.
            edits.append((*disk.backing, b""))
    for begin, end, text in sorted(edits, reverse=True):
        xml = xml[:begin] + text + xml[end:]
    return xml


def _moved_to(xml: bytes, at: int, attribute: str, value: str) -> tuple[int, int, bytes]:
    """The start tag at `at` with `attribute` in place of all that tells a place."""
    import re

    found = _start_tag(xml, at)
    value = value.replace("&", "&amp;").replace("<", "&lt;").replace("'", "&apos;")
    tag = re.sub(_PLACE, b"", found[0])
    name_end = re.match(rb"<[^\s/>]+", tag)
    end = name_end.end() if name_end else 0
    # Numbers for what is not ASCII: they mean the same in whatever encoding the XML is.
    text = f" {attribute}='{value}'".encode("ascii", "xmlcharrefreplace")
    return found.start(), found.end(), tag[:end] + text + tag[end:]


def _start_tag(xml: bytes, at: int) -> re.Match[bytes]:
    import re

    found = re.compile(_TAG).match(xml, at)
    if found is None:
        raise Damaged("a start tag of the domain's XML cannot be read")
    return found


def _is_block(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def run(words: list[str], xml: bytes, state: str) -> bytes:
    """Do what `words` (DOMAIN OPERATION SUB EXTRA) ask for; what is to be printed. Raises `Refusal`, `Damaged`."""
    operation, sub = words[1:3]
    begins = (operation, sub) in (("migrate", "begin"), ("prepare", "begin"), ("start", "begin"))
    if not begins and not os.path.isdir(os.path.join(state, "domains")):
        return b""
    domain = Domain(xml)
    if not _is_uuid(domain.uuid):
        raise Damaged(f"the XML of domain {words[0]} does not tell its UUID")
    expected = read_expected(state, domain.uuid)
    if expected is not None:
        _note(state, expected["job"], words)
    out = b""
    if operation == "migrate" and begins:
        out = _arrives(xml, domain, expected, state)
    elif begins:
        _starts(domain, expected, state, last=operation == "start")
    elif (operation, sub) == ("release", "end"):
        _forget(state, domain.uuid)
    return out


def _arrives(xml: bytes, domain: Domain, expected: dict[str, Any] | None, state: str) -> bytes:
    _remove(_arrival_path(state, domain.uuid))
    if expected is None or not expected["alive"] or not expected["disks"]:
        return b""
    changed = rewritten(xml, domain, expected["disks"])
    with open(_arrival_path(state, domain.uuid), "w", encoding="ascii") as file:
        file.write(f"{time.clock_gettime(time.CLOCK_BOOTTIME)} {expected['job']}")
    return b"" if changed == xml else changed


def _starts(domain: Domain, expected: dict[str, Any] | None, state: str, *, last: bool) -> None:
    arriving = _arriving(state, domain.uuid) if expected is not None and expected["alive"] else None
    if last:
        _remove(_arrival_path(state, domain.uuid))
    found = troubles(domain, state, arriving if expected and arriving == expected["job"] else None)
    if found:
        raise Refusal("\n".join(found))


def _arriving(state: str, uuid: str) -> str | None:
    """The job whose migration of this domain has begun here, and has not started it yet."""
    try:
        with open(_arrival_path(state, uuid), encoding="ascii") as file:
            begun, job = file.read().split()
    except (OSError, ValueError):
        return None
    passed = time.clock_gettime(time.CLOCK_BOOTTIME) - float(begun)
    return job if 0 <= passed <= ARRIVAL else None


def _arrival_path(state: str, uuid: str) -> str:
    return os.path.join(state, "domains", f"{uuid}.arriving")


def _note(state: str, job: str, words: list[str]) -> None:
    import json

    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    note = {"when": when, "domain": words[0], "operation": words[1], "sub": words[2], "extra": "".join(words[3:4])}
    try:
        with open(log_path(state, job), "a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")
    except OSError:
        return


def _forget(state: str, uuid: str) -> None:
    _remove(expected_path(state, uuid))
    _remove(_arrival_path(state, uuid))


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return


def _is_uuid(text: str) -> bool:
    return len(text) == 36 and all(sign in "0123456789abcdef-" for sign in text)


def _quoted(path: str) -> str:
    return "'" + path.replace("'", "'\\''") + "'"


def _load(place: str) -> Any:
    import json

    with open(place, "rb") as file:
        return json.loads(file.read())


def _run_before(words: list[str], xml: bytes) -> bytes:
    """Run the hook that was there before; the XML as it wants it. Ends with its exit code where that is not 0."""
    if not BEFORE or not os.access(BEFORE, os.X_OK):
        return xml
    given, printed = os.memfd_create("given"), os.memfd_create("printed")
    os.write(given, xml)
    os.lseek(given, 0, os.SEEK_SET)
    actions = [(os.POSIX_SPAWN_DUP2, given, 0), (os.POSIX_SPAWN_DUP2, printed, 1)]
    child = os.posix_spawn(BEFORE, [BEFORE, *words], os.environ, file_actions=actions)
    _, status = os.waitpid(child, 0)
    size = os.lseek(printed, 0, os.SEEK_END)
    out = os.pread(printed, size, 0)
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
    if code:
        _print(out)
        sys.exit(code)
    return out


def _read_all() -> bytes:
    parts = []
    try:
        while part := os.read(0, 1 << 16):
            parts.append(part)
    except OSError as error:
        raise Damaged(f"the domain's XML cannot be read from stdin: {error.strerror}") from error
    return b"".join(parts)


def _print(out: bytes) -> None:
    while out:
        out = out[os.write(1, out) :]


def _refuse(domain: str, lines: Iterable[str]) -> NoReturn:
    sys.stderr.write("\n".join([f"qemu-blkmig: domain {domain} is not started:", *lines]) + "\n")
    sys.exit(1)


def main(words: list[str]) -> None:
    """The hook."""
    if len(words) < 3:
        sys.exit("usage: qemu DOMAIN OPERATION SUB [EXTRA], the domain's XML on stdin, as libvirt calls its hooks")
    printed = b""
    # Only of these libvirt takes what is printed for the domain's XML.
    filters = words[1] in ("migrate", "restore")
    try:
        xml = _read_all()
        printed = _run_before(words, xml) if BEFORE else b""
        out = run(words, printed if filters and printed.strip() else xml, STATE)
    except Refusal as refusal:
        _refuse(words[0], str(refusal).split("\n"))
    except Exception as error:
        # What cannot be checked is not started; but nothing that ends or runs is hindered.
        if (words[1], words[2]) not in (("migrate", "begin"), ("prepare", "begin"), ("start", "begin")):
            _print(printed)
            return
        what = str(error) if isinstance(error, Damaged) else f"{type(error).__name__}: {error}"
        _refuse(
            words[0],
            [f"its images could not be checked: {what}", "  next: `qemu-blkmig hooks remove` does without the check"],
        )
    _print(out or printed)


if __name__ == "__main__":
    main(sys.argv[1:])
