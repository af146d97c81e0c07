"""An image file as a source: served, refused in words, and let go of."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

from qemu_blkmig.errors import Refused
from qemu_blkmig.job.imagefile import ImageFile, ImageSource, describe


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    return path


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, with the programs that serve an image."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in ("qemu-img", "qemu-nbd", "setpriv", "touch", "sleep"):
        (folder / program).symlink_to(str(shutil.which(program)))
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.mark.parametrize("program", ["qemu-img", "qemu-nbd", "setpriv"])
async def test_a_program_that_is_missing_is_named(image: Path, programs: Path, program: str) -> None:
    (programs / program).unlink()
    with pytest.raises(Refused, match=f"program {program} is not in PATH"):
        await ImageSource.serve([ImageFile(str(image))], image.parent)


async def test_a_server_that_forgets_sigterm_is_ended(image: Path, programs: Path) -> None:
    """qemu-nbd does, when the signal comes between its socket and its main loop."""
    (programs / "qemu-nbd").unlink()
    deaf = programs / "qemu-nbd"
    deaf.write_text(
        "#!/bin/sh\ntrap '' TERM\nfor a; do case $a in --socket=*) touch ${a#--socket=};; esac; done\nexec sleep 60\n"
    )
    deaf.chmod(0o755)
    source = await ImageSource.serve([ImageFile(str(image))], image.parent)
    async with asyncio.timeout(10):
        await source.close()


@pytest.mark.parametrize(("name", "words"), [("nothing", "No such file"), ("", "neither a file nor a block device")])
async def test_what_is_no_image_is_told_apart(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        await ImageSource.serve([ImageFile(str(tmp_path / name))], tmp_path)
    assert caught.value.advice is None


def _names_another(path: Path, how: str) -> None:
    other = path.with_name("secret")
    other.write_bytes(b"s" * 65536)
    options = {"backing": ["-b", str(other), "-F", "raw"], "data": ["-o", f"data_file={other},data_file_raw=on"]}[how]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "65536"], check=True)


@pytest.mark.parametrize("how", ["backing", "data"])
async def test_a_header_that_a_guest_may_have_written_is_not_believed_about_another_file(
    tmp_path: Path, how: str
) -> None:
    image = tmp_path / "disk"
    _names_another(image, how)
    with pytest.raises(Refused, match=f"goes on in {tmp_path / 'secret'}") as caught:
        await describe(str(image), None)
    assert caught.value.advice is not None and "--source-format raw" in caught.value.advice
    assert (await describe(str(image), "qcow2")).format == "qcow2"
    assert (await describe(str(image), "raw")).backing is None


async def test_a_descriptor_that_a_guest_may_have_written_is_not_believed_about_another_file(tmp_path: Path) -> None:
    """A VMDK may be plain text that names where its data lies."""
    image, secret = tmp_path / "disk", tmp_path / "secret"
    secret.write_bytes(b"s" * 65536)
    descriptor = (
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 128 FLAT "{secret}" 0\nddb.adapterType = "ide"\n'
    )
    image.write_bytes(descriptor.encode().ljust(1 << 20, b"\0"))
    with pytest.raises(Refused, match=f"looks like vmdk that goes on in {secret}"):
        await describe(str(image), None)
    assert (await describe(str(image), "raw")).size == 1 << 20


@pytest.fixture
def vmdk(tmp_path: Path) -> Path:
    path = tmp_path / "image.vmdk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", str(path), "1M"], check=True)
    return path


async def test_a_vmdk_of_one_file_is_recognized(vmdk: Path) -> None:
    assert (await describe(str(vmdk), None)).format == "vmdk"
