"""`lab`, in the laboratory: boots guests that write all the time, tells how they are, ends them.

lab guest NAME [--size SIZE] [--base]    make and boot one: /srv/vm/NAME.qcow2, its QMP socket NAME.qmp, and its
                                         QEMU command in NAME.command, which boots it in whichever folder it is run
lab domain NAME [--size SIZE]            the same, as a domain of libvirt's
lab look NAME                            whether it runs here, and how much it has written
lab end NAME | --all                     end it, here; a domain by virsh
lab job                                  wait until there is one job here, tell its name
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from integration.lab import Disk
from integration.virthosts import domain_xml
from qemu_blkmig.demo.guest import Kernel, Orders, boot_arguments, odd_memory

VM = Path("/srv/vm")
KERNEL, INITRAMFS = Kernel(Path("/srv/lab/vmlinuz"), "", Path()), Path("/srv/lab/initramfs")
ORDERS = Orders(rate=50, span=16 << 20)
LIMIT = 120.0
"""Seconds that a guest may take to boot, on a busy machine too."""


def main() -> int:
    """Do what is asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="lab", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    guest = commands.add_parser("guest")
    guest.add_argument("name")
    guest.add_argument("--size", default="256M")
    guest.add_argument("--base", action="store_true")
    guest.set_defaults(run=lambda given: boot(given.name, given.size, base=given.base))
    domain = commands.add_parser("domain")
    domain.add_argument("name")
    domain.add_argument("--size", default="256M")
    domain.set_defaults(run=lambda given: boot_domain(given.name, given.size))
    look = commands.add_parser("look")
    look.add_argument("name")
    look.set_defaults(run=lambda given: tell(given.name))
    ending = commands.add_parser("end")
    ending.add_argument("name", nargs="?")
    ending.add_argument("--all", action="store_true")
    ending.set_defaults(run=lambda given: end([given.name] if given.name else _names()))
    job = commands.add_parser("job")
    job.set_defaults(run=lambda _given: tell_job())
    given = parser.parse_args()
    return int(given.run(given))


def boot(name: str, size: str, *, base: bool) -> int:
    """Make a guest's disk and command, boot it, wait until it writes."""
    image, common = VM / f"{name}.qcow2", VM / "base.qcow2"
    _make(common if base else image, size)
    if base:
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", common.name, "-F", "qcow2", image)
    command = [
        "qemu-system-x86_64", "-accel", "tcg", "-machine", "pc", "-cpu", "max", "-nodefaults",
        "-m", f"{odd_memory(128) >> 10}K", "-display", "none", "-serial", f"file:{name}.console",
        "-qmp", f"unix:{name}.qmp,server=on,wait=off", "-qmp", f"unix:{name}.look,server=on,wait=off",
        "-blockdev", f"driver=qcow2,node-name=disk0,file.driver=file,file.filename={name}.qcow2",
        "-device", "virtio-blk-pci,id=vda,drive=disk0",
        *boot_arguments(KERNEL, INITRAMFS, ORDERS),
    ]  # fmt: skip
    (VM / f"{name}.command").write_text(shlex.join(command) + "\n")
    with (VM / f"{name}.log").open("w") as log:
        subprocess.Popen(command, cwd=VM, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    return _told_when_it_writes(name, f"its QMP socket is {VM}/{name}.qmp, its command is in {VM}/{name}.command")


def boot_domain(name: str, size: str) -> int:
    """Make a domain's disk, have libvirt boot it, wait until it writes."""
    image = VM / f"{name}.qcow2"
    _make(image, size)
    xml = domain_xml(name, [Disk(image, "qcow2", 0)], ORDERS, KERNEL, INITRAMFS, VM / f"{name}.console")
    (VM / f"{name}.xml").write_text(xml)
    _run("virsh", "define", VM / f"{name}.xml")
    _run("virsh", "start", name)
    return _told_when_it_writes(name, f"its image is {image}")


def _make(image: Path, size: str) -> None:
    if not image.exists():
        _run("qemu-img", "create", "-q", "-f", "qcow2", image, size)
        _run("qemu-io", "-c", "write -P 7 64M 64M", image)


def _told_when_it_writes(name: str, facts: str) -> int:
    deadline = time.monotonic() + LIMIT
    while not _written(name):
        if time.monotonic() > deadline:
            print(f"lab: {name} does not write: see {VM}/{name}.log and {name}.console", file=sys.stderr)
            return 1
        time.sleep(0.1)
    print(f"{name} runs; {facts}")
    return 0


def tell(name: str) -> int:
    """Whether it runs here; 1 if not."""
    try:
        status = _ask(name, "query-status")["status"] if (VM / f"{name}.look").exists() else _domain_state(name)
    except OSError:
        print(f"{name} is not on {socket.gethostname()}")
        return 1
    print(f"{name} is {status} on {socket.gethostname()}; it has written {_written(name)} records")
    return 0 if status == "running" else 1


def end(names: list[str]) -> int:
    """End these guests, if they are here."""
    for name in names:
        with contextlib.suppress(OSError):
            _ask(name, "quit")
    return 0


def tell_job() -> int:
    """The name of the one job that is not over; 1 if there is none for long."""
    state = Path(os.environ["QEMU_BLKMIG_STATE_DIR"])
    deadline = time.monotonic() + LIMIT
    while len(found := [path.parent.name for path in state.glob("*/record.json")]) != 1:
        if time.monotonic() > deadline:
            print(f"lab: there are {len(found)} jobs", file=sys.stderr)
            return 1
        time.sleep(0.1)
    print(found[0])
    return 0


def _domain_state(name: str) -> str:
    """libvirt's word. Raises `OSError` if it is not here."""
    asked = subprocess.run(["virsh", "-q", "domstate", name], capture_output=True, text=True)
    if asked.returncode:
        raise OSError(asked.stderr)
    return asked.stdout.strip()


def _names() -> list[str]:
    return [path.stem for path in VM.glob("*.look")]


def _written(name: str) -> int:
    """The highest number that the guest acknowledged on its console."""
    with contextlib.suppress(OSError):
        console = (VM / f"{name}.console").read_text(errors="replace")
        return max((int(number) for number in re.findall(r"blkmig ack \S+ seq (\d+)", console)), default=0)
    return 0


def _ask(name: str, command: str) -> dict[str, Any]:
    """What QEMU answers on the guest's second QMP socket. Raises `OSError` if it is not there."""
    os.chdir(VM)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(f"{name}.look")
        lines = connection.makefile("rw")
        lines.readline()
        for each in ("qmp_capabilities", command):
            lines.write(json.dumps({"execute": each}) + "\n")
            lines.flush()
            told: dict[str, Any] = {}
            while "return" not in told and "error" not in told:
                told = json.loads(lines.readline() or '{"error": "gone"}')
        answer: dict[str, Any] = told.get("return", {})
        return answer


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
