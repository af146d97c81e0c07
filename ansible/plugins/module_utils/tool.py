# Copyright (c) The qemu-blkmig developers
# GNU General Public License v2.0 or later (see COPYING or https://www.gnu.org/licenses/gpl-2.0.txt)
# SPDX-License-Identifier: GPL-2.0-or-later
"""qemu-blkmig's command line, by its JSON: Ansible's Python needs nothing of the tool's."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time

from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.trouble import Trouble, of_error

ALIVE = ("running", "busy")
POLL = 0.5
"""Seconds between two looks at a job that begins."""


def moves(job, name):
    """Whether a job moves the domain of that name or UUID."""
    return bool(job.get("domain")) and name in (job["domain"]["name"], job["domain"]["uuid"])


class Tool:
    """The commands of this host; `module` finds and runs them."""

    def __init__(self, module):
        self._module = module
        self._blkmig = module.get_bin_path("qemu-blkmig", required=True)

    def jobs(self, past=False):
        """The jobs that are not over, and with `past` those that are. Raises `Trouble`."""
        return self._ask("jobs", *(["--all"] if past else []))["jobs"]

    def jobs_of(self, name):
        """Those that move the domain of that name or UUID. Raises `Trouble`."""
        return [job for job in self.jobs() if moves(job, name)]

    def cancel(self, job):
        """Give up a job that runs. Raises `Trouble` if it comes to another end."""
        return self._ask("cancel", job)

    def clean_up(self, job):
        """Give up a job that was left behind. Raises `Trouble` where it cannot be settled."""
        return self._ask("cleanup", job)

    def follow(self, job):
        """Wait until a job of another process is over, or suspended; how it stands then. Raises `Trouble`."""
        command = [self._blkmig, "status", job, "--follow", "--output", "json"]
        last = None
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
        ) as process:
            for line in process.stdout:
                last = _parsed(line) or last
        if last is None:
            raise Trouble(f"job {job} could not be followed", job=job)
        if "error" in last:
            raise of_error(last["error"], job=job)
        return last

    def plan(self, words):
        """What `virsh-blkmigrate WORDS` would do, but for the XML. Raises `Trouble`, with the plan, if refused."""
        command = [*self._virsh_blkmigrate(words), "--dry-run"]
        _code, told, complaint = self._module.run_command(command)
        plan = {name: value for name, value in _result(told, complaint).items() if not name.endswith("xml")}
        if not plan["ready"]:
            raise Trouble(f"the preflight refuses: {'; '.join(plan['problems'])}", plan=plan)
        return plan

    def begin(self, words):
        """Start `virsh-blkmigrate WORDS`."""
        return Run([*self._virsh_blkmigrate(words), "--progress", "none"])

    def _virsh_blkmigrate(self, words):
        return [self._module.get_bin_path("virsh-blkmigrate", required=True), *words, "--output", "json"]

    def _ask(self, *words):
        _code, told, complaint = self._module.run_command([self._blkmig, *words, "--output", "json"])
        return _result(told, complaint)


class Run:
    """A migration that goes on whatever becomes of the module: a later one finds its job."""

    def __init__(self, command):
        self._stdout = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lasts as long as the run
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=self._stderr,
            start_new_session=True,
        )

    def result(self):
        """Wait for its end; what it tells. Raises `Trouble`."""
        self._process.wait()
        return _result(_all_of(self._stdout), _all_of(self._stderr))

    def under_way(self, find):
        """The job, found by `find`, once its preparations are over; None if it has ended before that."""
        while self._process.poll() is None:
            for job in find():
                if job["state"] in ALIVE and job["phase"] not in (None, "prepare"):
                    return job
            time.sleep(POLL)
        return None


def _all_of(file):
    file.seek(0)
    return file.read()


def _result(told, complaint):
    """The object in `told`. Raises `Trouble` where it is an error, or none."""
    found = _parsed(told)
    if found is None:
        lines = [line for line in complaint.splitlines() if line.strip()]
        raise Trouble(f"qemu-blkmig gave no result: {' '.join(lines[-3:]) or 'it told nothing'}")
    if "error" in found:
        job = found["error"].get("suspended")
        raise of_error(found["error"], **({"job": job} if job else {}))
    return found


def _parsed(text):
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
