"""What a base holds is read once, for as long as no file of its chain changes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qemu_blkmig.destination import basecache
from qemu_blkmig.destination.basecache import BaseCache, identity
from qemu_blkmig.destination.bases import Bases
from qemu_blkmig.destination.protocol import BaseDigest, BaseDigestReply
from qemu_blkmig.errors import Refused
from qemu_blkmig.hashing import Algorithm

MIB = 1 << 20


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image upon another one; both may be remembered at once."""
    monkeypatch.setattr(basecache, "SETTLED", 0.0)
    monkeypatch.setenv("QEMU_BLKMIG_STATE_DIR", str(tmp_path / "state"))
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", tmp_path / "below", "4M"], check=True)
    write(tmp_path / "below", 1)
    command = ["qemu-img", "create", "-qf", "qcow2", "-b", "below", "-F", "qcow2", str(tmp_path / "base")]
    subprocess.run(command, check=True)
    return tmp_path / "base"


def write(image: Path, value: int) -> None:
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P {value} 1M 64k", str(image)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


async def digest(base: Path, algorithm: Algorithm | None = "xxh3-128") -> BaseDigestReply:
    reply = await Bases(lambda _: None).answer(BaseDigest("d", str(base), "qcow2", algorithm))
    assert isinstance(reply, BaseDigestReply)
    return reply


async def test_what_is_known_is_not_read_again(base: Path) -> None:
    first, second = await digest(base), await digest(base)
    assert (first.size, first.read, second.read) == (4 * MIB, MIB, 0)
    assert first.root == second.root != b""
    other = await digest(base, "sha256")
    assert other.read == MIB and other.root != first.root
    assert (await digest(base, None)).root == b""


@pytest.mark.parametrize("name", ["base", "below"])
async def test_a_change_in_any_file_of_the_chain_is_seen(base: Path, name: str) -> None:
    first = await digest(base)
    write(base.parent / name, 2)
    second = await digest(base)
    assert second.read == MIB and second.root != first.root


async def test_a_file_that_changed_just_now_is_not_trusted_to_stay(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basecache, "SETTLED", 1000.0)
    assert [(await digest(base)).read for _ in range(2)] == [MIB, MIB]


async def test_a_base_that_is_none_is_refused(base: Path) -> None:
    base.write_bytes(b"nothing")
    with pytest.raises(Refused, match="not in qcow2 format") as refused:
        await digest(base)
    assert refused.value.disk == "d"


def test_the_memory_is_bounded_and_survives_damage_to_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basecache, "SETTLED", 0.0)
    monkeypatch.setattr(basecache, "MOST", 3)
    cache = BaseCache(tmp_path / "state/bases.json")
    known = []
    for number in range(5):
        (tmp_path / str(number)).touch()
        found = identity([str(tmp_path / str(number))])
        assert found is not None
        known.append(found)
        cache.keep(found, "sha256", bytes([number]))
    assert [cache.find(each, "sha256") for each in known] == [None, None, b"\2", b"\3", b"\4"]
    assert cache.find(known[4], "blake3") is None
    assert [each.name for each in (tmp_path / "state").iterdir()] == ["bases.json"]
    (tmp_path / "state/bases.json").write_text("damaged")
    assert cache.find(known[4], "sha256") is None


def test_what_does_not_tell_of_its_changes_has_no_identity(tmp_path: Path) -> None:
    assert identity(["/dev/null"]) is None
    assert identity([str(tmp_path / "missing")]) is None
