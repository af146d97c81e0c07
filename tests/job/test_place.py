"""Where images go, as it is written on the command line and in the record."""

from __future__ import annotations

import msgspec
import pytest

from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.place import Local, Place, Ssh, parse_place


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("local:/new", Local("/new")),
        ("ssh://hostb/new", Ssh("hostb", "/new")),
        ("ssh://root@hostb:2222/srv/vm/", Ssh("hostb", "/srv/vm", "root", 2222)),
        ("ssh://[fe80::1%eth0]/srv", Ssh("fe80::1%eth0", "/srv")),
        ("ssh://admin@[2001:db8::7]:22/srv", Ssh("2001:db8::7", "/srv", "admin", 22)),
        ("ssh://10.0.0.2/a:b@c", Ssh("10.0.0.2", "/a:b@c")),
    ],
)
def test_a_place_is_read_as_it_is_written(text: str, place: Place) -> None:
    assert parse_place(text) == place
    assert msgspec.json.decode(msgspec.json.encode(place), type=Place) == place


@pytest.mark.parametrize(
    "text",
    [
        "/new", "local:", "ssh:host/new", "ssh://host", "ssh:///new", "ssh://a b/new", "ssh://host:port/new",
        "ssh://host:0/new", "ssh://host:65536/new", "ssh://-oProxyCommand=x/new", "ssh://-l@host/new", "ssh://::1/new",
        "ssh://[::1/new", "ssh://@host/new", "tcp://host/new",
    ],
)  # fmt: skip
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_place(text)
