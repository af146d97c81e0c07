"""What tells a file from all others, and where its name leads."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_blkmig.destination.files import real_path


@pytest.mark.parametrize(
    "spelled", ["{}/there/a", "{}/link/a", "{}/there/./a", "{}//there//a", "{}/no/../there/a", "/{}/there/a"]
)
def test_all_spellings_of_a_path_lead_to_one_place_whether_a_file_is_there_or_not(spelled: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert real_path(None, spelled.format(tmp_path)) == f"{tmp_path}/there/a"
    (tmp_path / "there" / "a").symlink_to("b")
    assert real_path(None, spelled.format(tmp_path)) == f"{tmp_path}/there/b"


def test_what_is_no_name_leads_nowhere_else() -> None:
    assert real_path(None, "a\0b") == "a\0b"
