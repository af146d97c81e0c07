"""The Ansible collection: its own quick tests, Ansible's sanity checks, its documentation, its roles and its playbook.

All of it in the collection as it is built and installed from its archive, without a network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ansible_test
import pytest

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

CHECKS = (
    "action-plugin-docs", "changelog", "compile", "empty-init", "ignores", "line-endings", "no-assert",
    "no-get-exception", "no-illegal-filenames", "no-smart-quotes", "replace-urlopen", "shebang", "symlinks",
    "use-argspec-type-path", "use-compat-six",
)  # fmt: skip
"""Of `ansible-test sanity`: the others first download pip, from a host of Ansible's."""
VALIDATE = Path(ansible_test.__file__).parent / "_util/controller/sanity/validate-modules/validate.py"
"""What `ansible-test sanity --test validate-modules` runs once it has its own environment."""

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a command of Ansible's in the installed collection, and returns what it prints."""
    folder = tmp_path_factory.mktemp("ansible")
    installed = folder / "ansible_collections" / "qemu_blkmig" / "libvirt"
    settings = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "ANSIBLE_HOME": str(folder / "home"),
        "ANSIBLE_COLLECTIONS_PATH": str(folder),
        "ANSIBLE_NOCOLOR": "true",
        "ANSIBLE_LOCALHOST_WARNING": "false",
        "ANSIBLE_INVENTORY_UNPARSED_WARNING": "false",
        "PYTHONPATH": f"{VALIDATE.parent}:{folder}",
        "LC_ALL": "C.UTF-8",
    }

    def run(*words: object, ending: int | None = 0) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            cwd=installed if installed.exists() else REPOSITORY,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert ending in (None, done.returncode), f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    run("ansible-galaxy", "collection", "build", REPOSITORY / "ansible", "--output-path", folder)
    (archive,) = folder.glob("*.tar.gz")
    run("ansible-galaxy", "collection", "install", "--offline", "-p", folder, archive)
    return run


def test_its_quick_tests_pass(run: Callable[..., str]) -> None:
    assert " passed in " in run("ansible-test", "units", "--python", PYTHON)


def test_the_sanity_checks_pass_that_need_no_network(run: Callable[..., str]) -> None:
    run("ansible-test", "sanity", "--python", PYTHON, *(word for check in CHECKS for word in ("--test", check)))


@pytest.mark.parametrize(("kind", "folder"), [("module", "modules"), ("filter", "filter")])
def test_documentation_and_options_agree(run: Callable[..., str], kind: str, folder: str) -> None:
    collection = ["--collection", "ansible_collections/qemu_blkmig/libvirt", "--collection-version", "0.1.0"]
    told = run(
        sys.executable, VALIDATE, "--format", "json", "--arg-spec", *collection, "--plugin-type", kind,
        f"plugins/{folder}", ending=None,
    )  # fmt: skip
    codes = {error["code"] for found in json.loads(told).values() for error in found["errors"]}
    # Galaxy asks for the third version alone; ours is the second, or any later one.
    assert codes <= {"missing-gplv3-license"}, told


@pytest.mark.parametrize(
    ("kind", "name"),
    [("module", "blkmigrate"), ("module", "blkmigrate_info"), ("filter", "placement")],
)
def test_a_plugin_is_documented(run: Callable[..., str], kind: str, name: str) -> None:
    full = f"qemu_blkmig.libvirt.{name}"
    told = json.loads(run("ansible-doc", "--json", "-t", kind, full))[full]
    assert told["doc"]["short_description"] and told["examples"] and told["return"], told


def test_roles_and_playbook_are_understood(run: Callable[..., str]) -> None:
    roles = json.loads(run("ansible-doc", "--json", "-t", "role", "--list", "qemu_blkmig.libvirt"))
    assert set(roles) == {"qemu_blkmig.libvirt.host_setup", "qemu_blkmig.libvirt.migrate"}
    ends = ["-e", "empty_host_from=hosta", "-e", "empty_host_to=hostb"]
    run("ansible-playbook", "--syntax-check", "qemu_blkmig.libvirt.empty_host", *ends)
