"""Ansible on hosta: the collection as it is built and installed from its archive, and what its runs told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from integration.hosts import PORT, REPOSITORY
from integration.tool import Outcome
from integration.virtlab import VirtLab

_BIN = Path(sys.executable).parent
_INVENTORY = f"""
all:
  vars:
    ansible_python_interpreter: /usr/bin/python3
  hosts:
    hosta:
      ansible_connection: local
    hostb:
      ansible_port: {PORT}
      blkmigrate_uri: qemu+ssh://hostb:{PORT}/system
"""
LIMIT = 600
"""Seconds that no run of Ansible's here comes near, on a busy machine either."""


class Ansible:
    """Runs Ansible on hosta, in `folder`, with the collection installed there."""

    def __init__(self, virtlab: VirtLab, folder: Path) -> None:
        self._virtlab = virtlab
        self._folder = folder
        (folder / "inventory.yml").write_text(_INVENTORY)
        self._run("ansible-galaxy", "collection", "build", REPOSITORY / "ansible", "--output-path", folder).succeeded()
        (archive,) = folder.glob("*.tar.gz")
        self._run(
            "ansible-galaxy", "collection", "install", "--offline", "-p", folder / "collections", archive
        ).succeeded()

    def module(self, module: str, *, check: bool = False, **options: object) -> dict[str, Any]:
        """What a module of ours returns on hosta, and whether it `failed`; `check`: in check mode."""
        # Only so wordy a run keeps the diff.
        tree = self._folder / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        arguments = [json.dumps(options), "--diff", "-vvv", "--tree", tree, *(["--check"] if check else [])]
        told = self._run("ansible", "hosta", "-m", f"qemu_blkmig.libvirt.{module}", "-a", *arguments)
        assert (tree / "hosta").exists(), told
        result: dict[str, Any] = json.loads((tree / "hosta").read_text())
        return {**result, "failed": told.code != 0}

    def playbook(self, playbook: str | Path, *, check: bool = False, **variables: object) -> Outcome:
        """Run a playbook of ours, or a file, to its end."""
        return self._run("ansible-playbook", playbook, "-e", json.dumps(variables), *(["--check"] if check else []))

    def _run(self, program: str, *words: object) -> Outcome:
        command = [*self._virtlab.entering, *self._environment(), str(_BIN / program), *map(str, words)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def _environment(self) -> list[str]:
        home = self._folder / "home"
        # No connection stays open behind a run, nothing is kept at home, and hostb's sshd has no sftp.
        settings = {
            "PATH": f"{_BIN}:{os.environ['PATH']}",
            "ANSIBLE_HOME": home,
            "ANSIBLE_LOCAL_TEMP": home / "tmp",
            "ANSIBLE_REMOTE_TEMP": home / "tmp",
            "ANSIBLE_COLLECTIONS_PATH": self._folder / "collections",
            "ANSIBLE_INVENTORY": self._folder / "inventory.yml",
            "ANSIBLE_ASYNC_DIR": home / "async",
            "ANSIBLE_TIMEOUT": "100",
            "ANSIBLE_PIPELINING": "true",
            "ANSIBLE_SSH_ARGS": "-o ControlMaster=no",
            "ANSIBLE_NOCOLOR": "true",
        }
        return [f"{name}={value}" for name, value in settings.items()]
