"""Builds the small real guest: Debian's kernel and an initramfs made on the spot, and the arguments that boot it."""

from __future__ import annotations

import lzma
import os
import re
import stat
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from qemu_blkmig.errors import Refused

Writer = Literal["idle", "random", "hot", "sequential", "zipf", "log"]

_MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console", "pvpanic-pci")
_AGENT_MODULES = ("ext4",)
_PERL_LIBRARY = ("strict.pm", "integer.pm")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of the host that the guest boots; `modules` is its folder under /lib/modules."""

    image: Path
    version: str
    modules: Path


@dataclass(frozen=True, slots=True)
class Orders:
    """What the guest is to do, told on the kernel's command line.

    `rate`: records a second on each disk, 0 for as fast as it goes, None for the writer's own (idle: 5, else 0).
    `disks`: names in the guest (vda); empty: every writable disk. `span`: most bytes of records on one disk, spread
    over all of it, so that a large sparse disk stays sparse. `agent`: instead of records, the first disk gets an ext4
    that files are written to, and Debian's guest agent listens on the virtio-serial port org.qemu.guest_agent.0.
    """

    writer: Writer = "random"
    rate: int | None = None
    disks: Sequence[str] = ()
    span: int = 64 << 20
    agent: bool = False

    def command_line(self) -> str:
        """The kernel's command line."""
        rate = self.rate if self.rate is not None else (5 if self.writer == "idle" else 0)
        # A busy machine keeps an emulated timer waiting for longer than the kernel's check of it does. Tests of the
        # kernel's own ciphers are a fifth of an emulated boot.
        words = ["console=ttyS0", "quiet", "no_timer_check", "cryptomgr.notests", f"blkmig.writer={self.writer}"]
        words += [f"blkmig.rate={rate}", f"blkmig.span={self.span}"]
        if self.disks:
            words.append(f"blkmig.disks={','.join(self.disks)}")
        if self.agent:
            words.append("blkmig.agent=1")
        return " ".join(words)


def find_kernel(boot: Path = Path("/boot"), modules: Path = Path("/lib/modules")) -> Kernel:
    """The newest cloud kernel, else the newest other one, that has its modules. Raises `Refused` if there is none."""
    for pattern in ("vmlinuz-*-cloud-amd64", "vmlinuz-*-amd64"):
        for image in sorted(boot.glob(pattern), key=_version_order, reverse=True):
            version = image.name.removeprefix("vmlinuz-")
            if (modules / version / "modules.dep").exists() and os.access(image, os.R_OK):
                return Kernel(image, version, modules / version)
    raise Refused(
        f"no readable kernel {boot}/vmlinuz-*-amd64 with modules in {modules}",
        advice="install the Debian package linux-image-cloud-amd64",
    )


def odd_memory(mebibytes: int) -> int:
    """Bytes of a guest's memory that QEMU before 9.0 migrates whole under TCG: a little more than `mebibytes`.

    Such a QEMU loses writes of an emulated guest to memory whose size is a multiple of 64 pages
    (docs/decisions/009-ram-under-tcg.md).
    """
    return (mebibytes << 20) + (8 << 10)


def boot_arguments(kernel: Kernel, initramfs: Path, orders: Orders) -> list[str]:
    """QEMU's arguments that boot the guest; its console is the first serial port."""
    return ["-kernel", str(kernel.image), "-initrd", str(initramfs), "-append", orders.command_line()]


def build_initramfs(path: Path, kernel: Kernel, *, agent: bool = False) -> None:
    """Write the guest's initramfs to `path`; `agent` adds what `Orders.agent` needs.

    Raises `Refused` naming the Debian package that is missing.
    """
    archive = _Archive()
    scripts = resources.files("qemu_blkmig.demo") / "guest"
    for name, mode in (("init", 0o755), ("writer.pl", 0o644), ("files.pl", 0o644)):
        archive.add(name, (scripts / name).read_bytes(), mode)
    archive.add_file("bin/busybox", _busybox())
    programs = {"usr/bin/perl": _program("/usr/bin/perl", "perl-base")}
    if agent:
        programs["usr/sbin/qemu-ga"] = _program("/usr/sbin/qemu-ga", "qemu-guest-agent")
        programs["usr/sbin/mkfs.ext4"] = _program("/usr/sbin/mkfs.ext4", "e2fsprogs")
    for name, program in programs.items():
        archive.add_file(name, program)
        for library in _shared_libraries(program):
            archive.add_file(str(library).lstrip("/"), library)
    perl_library = _perl_library()
    for name in _PERL_LIBRARY:
        archive.add_file(str(perl_library / name).lstrip("/"), perl_library / name)
    order = _load_order(kernel, (*_MODULES, *(_AGENT_MODULES if agent else ())))
    for module in order:
        archive.add(f"modules/{_plain_name(module)}", _module_content(kernel.modules / module))
    archive.add("modules/order", "".join(f"{_plain_name(module)}\n" for module in order).encode())
    path.write_bytes(archive.finish())


def _version_order(image: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", image.name)]


def _program(path: str, package: str) -> Path:
    program = Path(path)
    if not os.access(program, os.R_OK):
        raise Refused(f"{path} is missing or cannot be read", advice=f"install the Debian package {package}")
    return program


def _busybox() -> Path:
    for candidate in (Path("/bin/busybox"), Path("/usr/bin/busybox")):
        if os.access(candidate, os.R_OK):
            if _shared_libraries(candidate):
                raise Refused(f"{candidate} is not static", advice="install the Debian package busybox-static")
            return candidate
    raise Refused("there is no busybox", advice="install the Debian package busybox-static")


def _shared_libraries(program: Path) -> list[Path]:
    """The libraries and the loader of `program`; empty for a static one."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    return [Path(name) for name in re.findall(r"(?:^\s*|=> )(/\S+) \(0x", listed.stdout, re.MULTILINE)]


def _perl_library() -> Path:
    printed = subprocess.run(
        ["/usr/bin/perl", "-e", 'print join "\\n", @INC'], capture_output=True, text=True, env={"PATH": "/usr/bin"}
    )
    for folder in (Path("/usr/lib/x86_64-linux-gnu/perl-base"), *map(Path, printed.stdout.splitlines())):
        if all((folder / name).exists() for name in _PERL_LIBRARY):
            return folder
    raise Refused("/usr/bin/perl does not find its strict.pm", advice="install the Debian package perl-base")


def _plain_name(module: str) -> str:
    return Path(module).name.removesuffix(".xz")


def _stem(module: str) -> str:
    return _plain_name(module).removesuffix(".ko").replace("-", "_")


def _load_order(kernel: Kernel, wanted: Iterable[str]) -> list[str]:
    """Paths, below the kernel's modules, of what `wanted` needs, each after what it depends upon.

    A wrong order leaves the guest without its disks (FACTS.md), hence modules.dep.
    """
    dependencies: dict[str, list[str]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        module, _, needs = line.partition(":")
        dependencies[module] = needs.split()
    by_name = {_stem(module): module for module in dependencies}
    builtin = {_stem(line) for line in (kernel.modules / "modules.builtin").read_text().splitlines()}
    order: list[str] = []

    def add(module: str) -> None:
        for need in dependencies[module]:
            if need not in order:
                add(need)
        if module not in order:
            order.append(module)

    for name in (name.replace("-", "_") for name in wanted):
        if name in by_name:
            add(by_name[name])
        elif name not in builtin:
            raise Refused(
                f"the kernel {kernel.version} has no driver {name}",
                advice="install the Debian package linux-image-cloud-amd64",
            )
    return order


def _module_content(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".ko":
        return path.read_bytes()
    raise Refused(f"{path} is compressed in a way that is not understood")


class _Archive:
    """A cpio archive in the kernel's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._names: set[str] = set()

    def add_file(self, name: str, source: Path) -> None:
        """Add the file that `source` is or leads to; adding a name again is nothing."""
        if name not in self._names:
            self.add(name, source.read_bytes(), 0o755 if os.access(source, os.X_OK) else 0o644)

    def add(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Add a file, and the folders above it."""
        for folder in reversed(list(_parents(name))):
            if folder not in self._names:
                self._entry(folder, b"", stat.S_IFDIR | 0o755)
        self._entry(name, content, stat.S_IFREG | mode)

    def finish(self) -> bytes:
        """The whole archive."""
        self._entry("TRAILER!!!", b"", 0)
        return b"".join(self._pieces)

    def _entry(self, name: str, content: bytes, mode: int) -> None:
        self._names.add(name)
        path = name.encode() + b"\0"
        fields = (len(self._names), mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._pieces += [_padded(header + path), _padded(content)]


def _parents(name: str) -> Iterator[str]:
    for parent in Path(name).parents:
        if parent != Path():
            yield str(parent)


def _padded(piece: bytes) -> bytes:
    return piece + b"\0" * (-len(piece) % 4)
