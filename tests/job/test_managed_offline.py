"""Which files of a domain that does not run are copied, and where they go."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from qemu_blkmig.destination.protocol import Image
from qemu_blkmig.job import managed_offline
from qemu_blkmig.job.arrangement import Arrangement, variables_there
from qemu_blkmig.job.base_choice import LayerThere
from qemu_blkmig.job.imagefile import ImageFile
from qemu_blkmig.job.managed_offline import OfflineImage, left_behind, offline_images, plan_offline
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.place import Ssh
from qemu_blkmig.job.plan import Placed, Plan
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.virt.domain import Domain

XML = "<domain><name>web1</name><os><nvram>{nvram}</nvram></os><devices/></domain>"


def test_uefi_variables_go_where_the_definition_for_the_destination_has_them(tmp_path: Path) -> None:
    here = tmp_path / "web1.fd"
    here.write_bytes(bytes(8))
    domain = Domain.parse(XML.format(nvram=here))
    for persistent, there in ((None, "/there.fd"), (XML.format(nvram="/defined.fd"), "/defined.fd")):
        (image,) = offline_images(domain, Arrangement({}, XML.format(nvram="/there.fd"), persistent))
        assert (image.file.path, image.placed.path, image.variables) == (str(here), there, True)


def test_variables_that_are_in_no_file_of_libvirt_s_are_not_left_behind_without_a_word() -> None:
    told = [*left_behind(Domain.parse("<domain><os><varstore path='/x.json'/></os></domain>"), "qemu:///system")]
    assert len(told) == 1 and "lie in a <varstore>, which is not copied" in told[0]
    assert not [*left_behind(Domain.parse("<domain><os/></domain>"), "qemu:///system")]


@pytest.mark.parametrize(("runs", "where"), [(True, "/live.fd"), (False, "/defined.fd")])
def test_where_uefi_variables_are_written_to_is_where_another_domain_s_are_looked_for(runs: bool, where: str) -> None:
    """QEMU writes those of a domain that runs, we those of one that does not."""
    assert variables_there(XML.format(nvram="/live.fd"), XML.format(nvram="/defined.fd"), runs=runs) == where
    assert variables_there(XML.format(nvram="/live.fd"), None, runs=runs) == "/live.fd"


async def test_a_layer_that_would_come_to_where_another_disk_goes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image has a plan of its own, which knows nothing of the others."""
    layers = {"vda": (LayerThere("vda", "/here/mid", "qcow2", "/there/mid", None, there=False, place="/there/mid"),)}

    class _Planner:
        def __init__(self, *_: object, **__: object) -> None:
            """Knows one disk."""

        async def plan_image(self, _: object, placed: Placed) -> Plan:
            image = Image(placed.target, placed.path, "qcow2", 1 << 20, create=True)
            return Plan((), (), {placed.target: image}, (), (), layers=layers.get(placed.target, ()))

    async def describe(path: str, image_format: str) -> Disk:
        return Disk(path, "", "", "", image_format, 1 << 20, path, None, (), None, encrypted=False, allocated=None)

    monkeypatch.setattr(managed_offline, "Planner", _Planner)
    monkeypatch.setattr(managed_offline, "describe", describe)
    options = ManagedOptions("web", "test:///default", Ssh("hostb", "/"))
    images = [
        OfflineImage(ImageFile(f"/here/{disk}", "qcow2", disk), Placed(disk, path))
        for disk, path in (("vda", "/there/top"), ("vdb", "/there/mid"))
    ]
    first, second = await plan_offline(options, images, cast(AgentClient, None))
    assert not first.problems
    assert "its layer /here/mid would come to /there/mid, where the image of disk vdb goes" in second.problems[0]
