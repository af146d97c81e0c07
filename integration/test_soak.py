"""Some runs of the soak (integration.soak): seeds whose faults and phases differ, and that are over soon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from integration.cases import Case, run
from integration.far import far_laboratory
from integration.lab import laboratory
from integration.thorough import also
from qemu_blkmig.demo.guest import Kernel

FAR_SEEDS = (27, 46, *also(1, 33, 86))
NEAR_SEEDS = (3, 26, 38, *also(4, 5, 59, 63))


@pytest.mark.parametrize("seed", FAR_SEEDS)
def test_what_breaks_on_the_way_to_another_host_loses_nothing(
    kernel: Kernel, initramfs: Callable[[bool], Path], seed: int
) -> None:
    with far_laboratory(kernel, initramfs) as lab:
        assert run(Case.draw(seed, far=True), lab).struck


@pytest.mark.parametrize("seed", NEAR_SEEDS)
def test_what_breaks_on_one_host_loses_nothing(kernel: Kernel, initramfs: Callable[[bool], Path], seed: int) -> None:
    with laboratory(kernel, initramfs) as lab:
        assert run(Case.draw(seed, far=False), lab).struck
