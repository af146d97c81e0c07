"""Messages of a coordinator that means harm, drawn from a seed; and the tree of files that it must not get at."""

from __future__ import annotations

import json
import os
import random
import subprocess
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from qemu_blkmig.destination import protocol
from qemu_blkmig.nbd.address import UnixAddress

KIB, MIB = 1 << 10, 1 << 20
NUMBERS = (0, 1, -1, 511, 512, 513, 4096, MIB, MIB + 512, 1 << 31, 1 << 32, (1 << 63) - 512, (1 << 63) - 1, -(1 << 63))


class Ground:
    """`root`, where an agent may work, and `outside`, where it may not, with ways that seem to lead from one to the
    other. `source` is the size of the export that is there to be copied.
    """

    source = MIB

    def __init__(self, directory: Path) -> None:
        self.root, self.outside = directory / "root", directory / "outside"
        for folder in (self.root, self.outside, self.root / "folder"):
            folder.mkdir()
        (self.outside / "secret").write_bytes(b"secret" * 1000)
        (self.outside / "image").write_bytes(bytes(MIB))
        (self.root / "image").write_bytes(bytes(MIB))
        (self.root / "out").symlink_to(self.outside)
        (self.root / "secret").symlink_to(self.outside / "secret")
        (self.root / "image-out").symlink_to("../outside/image")
        (self.root / "dangling").symlink_to(self.outside / "made")
        (self.root / "loop").symlink_to("loop")
        os.mkfifo(self.root / "fifo")
        for name, backing in (("base", None), ("upon-secret", self.outside / "image")):
            image = ["qemu-img", "create", "-q", "-f", "qcow2", str(self.root / f"{name}.qcow2"), str(MIB)]
            subprocess.run(
                [*image[:5], *(("-b", str(backing), "-F", "raw") if backing else ()), *image[5:]], check=True
            )
        self.given = {path for path in self.root.rglob("*") if not path.is_dir()}
        self._before = self._snapshot()

    def assert_nothing_outside_was_touched(self) -> None:
        """Assert it, of content, names, times and modes."""
        assert self._snapshot() == self._before

    def paths(self) -> list[str]:
        """Some that are within the root, some that only look so, some that do not."""
        root, outside = str(self.root), str(self.outside)
        inside = [f"{root}/{name}" for name in ("new", "other", "folder/new", "image", "base.qcow2", "new.qcow2")]
        ways_out = ["../outside/new", "out/new", "out/image", "secret", "image-out", "dangling", "upon-secret.qcow2"]
        odd = ["loop", "fifo", "folder", "", "folder/../../outside/new", "./new", "//new", "new/", "a\0b", "x" * 300]
        odd += ["\N{LATIN SMALL LETTER E WITH ACUTE}", "-rf", "new,lazy-refcounts=on"]
        plain = [f"{outside}/new", f"{outside}/secret", f"{outside}/image", f"{root}2/new", "/dev/full", "new", ""]
        plain += [f'json:{{"driver":"file","filename":"{outside}/new"}}', f"file:{outside}/new", "/proc/self/mem"]
        return inside * 2 + [f"{root}/{name}" for name in (*ways_out, *odd)] + plain

    def _snapshot(self) -> dict[str, tuple[bytes, int, int, int]]:
        found = {}
        for path in self.outside.rglob("*"):
            status = path.lstat()
            found[str(path)] = (path.read_bytes(), status.st_mtime_ns, status.st_mode, status.st_size)
        return found


class Drawer:
    """Draws messages of the protocol with sense only in their form; `texts`: for fields that are not known by name."""

    def __init__(self, seed: int, texts: Sequence[str], by_name: Mapping[str, Sequence[str]] = {}) -> None:
        self.dice = random.Random(seed)
        self._texts = texts
        self._by_name = by_name

    def struct(self, kind: Any) -> dict[str, Any]:
        """A message of this kind."""
        hints = typing.get_type_hints(kind)
        drawn = {
            field.encode_name: self._value(field.name, hints[field.name]) for field in msgspec.structs.fields(kind)
        }
        tag = kind.__struct_config__.tag
        return drawn if tag is None else {"type": tag} | drawn

    def _value(self, name: str, kind: Any) -> Any:
        if isinstance(kind, type) and issubclass(kind, protocol.Message):
            return self.struct(kind)
        origin, inside = typing.get_origin(kind), typing.get_args(kind)
        if origin in (types.UnionType, typing.Union):
            return self._value(name, self.dice.choice(inside))
        if origin is typing.Literal:
            return self.dice.choice(inside)
        if origin is list:
            return [self._value(name, inside[0]) for _ in range(self.dice.choice((0, 1, 1, 2, 50)))]
        if origin is tuple:
            return [self._value(name, each) for each in inside if each is not Ellipsis]
        return self._plain(name, kind)

    def _plain(self, name: str, kind: Any) -> Any:
        if kind is bool:
            return self.dice.random() < 0.5
        if kind is int:
            return self.dice.choice((*NUMBERS, self.dice.randrange(2 * MIB)))
        if kind is float:
            return self.dice.choice((0.0, -1.0, 1e308))
        if kind is type(None):
            return None
        return self.dice.choice(self._by_name.get(name, self._texts))

    def damaged(self, message: dict[str, Any]) -> dict[str, Any]:
        """`message`, but with something that the protocol does not have."""
        key = self.dice.choice(sorted(message))
        deep: Any = []
        for _ in range(900):
            deep = [deep]
        wrong: list[Any] = [None, [], {}, "x", -1, [[[[]]]], {"type": "bye"}, 1 << 70, deep]
        match self.dice.randrange(4):
            case 0:
                return message | {key: self.dice.choice(wrong)}
            case 1:
                return {name: value for name, value in message.items() if name != key}
            case 2:
                return message | {"more": self.dice.choice(wrong)}
            case _:
                return message | {"type": self.dice.choice(("", "eval", "__class__", "Hello"))}


class Coordinator:
    """Draws requests: sound ones, sound in form only, and damaged ones. `socket`: of an export `disk` of MIB bytes."""

    def __init__(self, seed: int, ground: Ground, socket: Path) -> None:
        self._paths = ground.paths()
        self._socket = str(socket)
        self._number = 0
        formats = ("raw", "qcow2", "vmdk", "luks", "json:", "", "raw,size=1")
        disks = ("d", "e", "", "../d", "d" * 1000)
        named = {"disk": disks, "format": formats, "export": ("disk", "", "no"), "socket": (self._socket, *self._paths)}
        self._draw = Drawer(seed, self._paths, named)
        self._dice = self._draw.dice

    def lines(self, count: int) -> Iterator[bytes]:
        """So many lines, none of which ends the agent by itself."""
        yield self._line(msgspec.to_builtins(protocol.Hello("0", protocol.PROTOCOL)))
        for _ in range(count - 1):
            kind = self._dice.random()
            if kind < 0.1:
                yield self._sound()
            elif kind < 0.8:
                yield self._line(self._operation())
            else:
                yield self._line(self._draw.damaged(self._operation()))

    def _line(self, operation: Any) -> bytes:
        self._number += 1
        return json.dumps({"id": self._number, "op": operation}).encode() + b"\n"

    def _sound(self) -> bytes:
        """What gets the agent to work at all."""
        disk, path = self._dice.choice("de"), self._dice.choice(self._paths[:12])
        image = protocol.Image(disk, path, "qcow2" if path.endswith("qcow2") else "raw", MIB, create=True)
        steps: list[protocol.Message] = [
            protocol.Prepare([image]),
            protocol.Open(disk, UnixAddress(self._socket), "disk", 1, 2, 64 * KIB, 4096),
            protocol.Copy(disk, "bulk", [(0, MIB)]),
            protocol.Flush(disk),
            protocol.Close(disk),
        ]
        return b"".join(self._line(msgspec.to_builtins(step)) for step in steps[: self._dice.randrange(1, 6)])

    def _operation(self) -> dict[str, Any]:
        kinds = [kind for kind in typing.get_args(protocol.Operation) if kind is not protocol.Bye]
        return self._draw.struct(self._dice.choice(kinds))
