"""Wheel, sdist and Debian package: each is built, installed into a clean place, and used there."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from integration.hosts import REPOSITORY
from qemu_blkmig import __version__

LIMIT = 1500
"""Seconds that nothing here comes near, on a busy machine either."""

pytestmark = pytest.mark.timeout(2 * LIMIT)


def run(*command: object, **environment: str) -> str:
    """Run it to its end; what it printed."""
    inherited = {name: text for name, text in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist; the wheel is made from what the sdist holds, as `build` does it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, REPOSITORY)
    return folder


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_a_distribution_installs_into_an_empty_environment_and_works(built: Path, kind: str, tmp_path: Path) -> None:
    (package,) = built.glob(kind)
    environment = tmp_path / "environment"
    # Debian's own Python, whose packages hold libnbd's binding; nothing else of ours is in there.
    run("/usr/bin/python3", "-m", "venv", "--system-site-packages", environment)
    run(environment / "bin" / "pip", "install", "--quiet", package)
    tool, state = environment / "bin" / "qemu-blkmig", str(tmp_path / "state")
    assert run(tool, "--version").strip() == f"qemu-blkmig {__version__}"
    # What is no Python must have come along, too: the demo's guest, the hook, the mark of typed code.
    inside = "import qemu_blkmig; print(qemu_blkmig.__path__[0])"
    place = Path(run(environment / "bin" / "python", "-I", "-c", inside).strip())
    assert place.is_relative_to(environment)
    for file in REPOSITORY.joinpath("qemu_blkmig").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert (place / file.relative_to(REPOSITORY / "qemu_blkmig")).is_file(), file
    for folder in ("source", "target"):
        (tmp_path / folder).mkdir()
    image = tmp_path / "source" / "disk"
    image.write_bytes(os.urandom(1 << 20))
    run(tool, "copy", f"image:{image}", f"local:{tmp_path / 'target'}", "--verify", "full", QEMU_BLKMIG_STATE_DIR=state)
    assert (tmp_path / "target" / "disk").read_bytes() == image.read_bytes()


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="a copy of the checkout cannot list its files")
def test_the_sdist_holds_what_builds_and_tests_need(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        names = {name.partition("/")[2] for name in members.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    unwanted = (".ci/", ".gitignore")
    assert {name for name in listed.splitlines() if not name.startswith(unwanted)} <= names


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a Debian to install into")
def test_the_debian_package_is_built_installed_used_and_purged_in_a_clean_debian(tmp_path: Path) -> None:
    run("scripts/deb", tmp_path)
    (package,) = tmp_path.glob("*.deb")
    told = run("scripts/deb-try", package)
    assert "deb-try: done" in told and f"qemu-blkmig {__version__}" in told


def test_the_debian_package_has_our_version() -> None:
    assert f"qemu-blkmig ({__version__})" in (REPOSITORY / "debian" / "changelog").read_text().splitlines()[0]
