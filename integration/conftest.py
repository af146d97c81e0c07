"""Fixtures of the integration tests: the guest's initramfs, made once, and a laboratory for each test."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.lab import Lab, laboratory
from integration.luck import Bench
from integration.unpacked import unpacked
from integration.virthosts import VirtHosts, two_virt_hosts
from integration.virtlab import Domain, VirtLab
from qemu_blkmig.demo.guest import Kernel, build_initramfs, find_kernel

LONGEST = tuple(f"test_{name}.py" for name in ("packages", "ansible", "docs", "meanwhile", "kills", "resume"))
"""Files with tests of up to minutes. They come first: begun last, one would keep everybody waiting for one worker."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """See `integration.thorough`."""
    parser.addoption("--thorough", action="store_true", help="test every moment of everything (about twice the time)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """See `integration.thorough`, and LONGEST."""
    if not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    """The kernel that the guests boot."""
    return unpacked(find_kernel(), tmp_path_factory.mktemp("kernel") / "vmlinux")


@pytest.fixture(scope="session")
def initramfs(kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Where the initramfs without or with (True) the guest agent is; each is made once."""
    folder = tmp_path_factory.mktemp("initramfs")

    @functools.cache
    def made(agent: bool) -> Path:
        path = folder / f"agent-{agent}.cpio"
        build_initramfs(path, kernel, agent=agent)
        return path

    return made


@pytest.fixture
def lab(kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[Lab]:
    """A laboratory for one test."""
    with laboratory(kernel, initramfs) as laid_out:
        yield laid_out


@pytest.fixture(scope="module")
def bench(kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[Bench]:
    """A guest that is shared by the tests of one file, as long as they leave it running."""
    with laboratory(kernel, initramfs) as laid_out:
        yield Bench(laid_out)


@pytest.fixture(scope="module")
def virt() -> Iterator[VirtHosts]:
    """hosta and hostb with a libvirt each, shared by the tests of one file."""
    with two_virt_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def virtlab(virt: VirtHosts, kernel: Kernel, initramfs: Callable[[bool], Path]) -> VirtLab:
    """Guests of libvirt's on hosta, and the tool, for the tests of one file."""
    return VirtLab(virt, kernel, initramfs)


@pytest.fixture
def domain(virtlab: VirtLab) -> Iterator[Domain]:
    """A guest with one qcow2 disk, 16 MiB of it data, which writes. Those that stay are shared, as `bench` is."""
    taken = virtlab.take()
    yield taken
    virtlab.keep(taken)
