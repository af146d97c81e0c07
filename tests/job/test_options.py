"""What the user may ask for, and what is refused with a word."""

from __future__ import annotations

from typing import Any

import pytest

from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.options import MigrateOptions, Target, Transfer
from qemu_blkmig.job.place import Local
from qemu_blkmig.units import parse_rate, parse_size, show_bytes, show_seconds


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("64k", 65536), ("1M", 1 << 20), ("2GiB", 2 << 30), ("1t", 1 << 40)]
)
def test_sizes_take_suffixes_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5M", "M", "1 2", "1X"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_a_bare_bandwidth_is_in_mebibytes_as_in_virsh() -> None:
    assert parse_rate("10") == 10 << 20
    assert parse_rate("10k") == 10 << 10


def test_bytes_and_seconds_are_shown_for_people() -> None:
    assert [show_bytes(512), show_bytes(1536), show_bytes(3 << 40)] == ["512 B", "1.5 KiB", "3.0 TiB"]
    assert [show_seconds(0.012), show_seconds(2.5)] == ["12 ms", "2.5 s"]


def test_the_destination_qemu_is_named_in_exactly_one_way() -> None:
    for target, pause_only in (
        (Target(Local("/x")), False),
        (Target(Local("/x"), qmp="/q", launch="qemu"), False),
        (Target(Local("/x"), qmp="/q"), True),
    ):
        with pytest.raises(UsageError, match="exactly one way"):
            MigrateOptions(source="/s", target=target, pause_only=pause_only)


@pytest.mark.parametrize(
    "wrong",
    [
        {"granularity": 1000},
        {"granularity": 256},
        {"chunk_size": 3 << 20},
        {"request_size": 64 << 20},
        {"connections": 0},
        {"requests": 65},
        {"bandwidth": 1},
        {"bandwidth": 1 << 63},
        {"group": ("backup", 1 << 63)},
    ],
    ids=str,
)
def test_tuning_out_of_bounds_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Transfer(**wrong)


def test_a_launch_command_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(UsageError, match="no shell command"):
        Target(Local("/x"), launch="qemu 'unclosed")
    with pytest.raises(UsageError, match="empty"):
        Target(Local("/x"), launch="  ")
