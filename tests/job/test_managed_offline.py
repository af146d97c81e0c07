"""Which files of a domain that does not run are copied, and where they go."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_blkmig.job.arrangement import Arrangement, variables_there
from qemu_blkmig.job.managed_offline import offline_images
from qemu_blkmig.virt.domain import Domain

XML = "<domain><name>web1</name><os><nvram>{nvram}</nvram></os><devices/></domain>"


def test_uefi_variables_go_where_the_definition_for_the_destination_has_them(tmp_path: Path) -> None:
    here = tmp_path / "web1.fd"
    here.write_bytes(bytes(8))
    domain = Domain.parse(XML.format(nvram=here))
    for persistent, there in ((None, "/there.fd"), (XML.format(nvram="/defined.fd"), "/defined.fd")):
        (image,) = offline_images(domain, Arrangement({}, XML.format(nvram="/there.fd"), persistent))
        assert (image.file.path, image.placed.path, image.variables) == (str(here), there, True)


@pytest.mark.parametrize(("runs", "where"), [(True, "/live.fd"), (False, "/defined.fd")])
def test_where_uefi_variables_are_written_to_is_where_another_domain_s_are_looked_for(runs: bool, where: str) -> None:
    """QEMU writes those of a domain that runs, we those of one that does not."""
    assert variables_there(XML.format(nvram="/live.fd"), XML.format(nvram="/defined.fd"), runs=runs) == where
    assert variables_there(XML.format(nvram="/live.fd"), None, runs=runs) == "/live.fd"
