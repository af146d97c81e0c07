# Copyright (c) The qemu-blkmig developers
# GNU General Public License v2.0 or later (see COPYING or https://www.gnu.org/licenses/gpl-2.0.txt)
# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain is to be at another host: what has to be done for that, and what was done."""

from __future__ import annotations

from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.tool import ALIVE
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.trouble import Trouble, sentence
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.virsh import SHUT_OFF


class Migration:
    """What `wanted` (the module's parameters) asks for, between the libvirts `here` and `there`."""

    def __init__(self, wanted, tool, here, there):
        self._wanted = wanted
        self._tool = tool
        self._here = here
        self._there = there

    def run(self, check_mode):
        """Do it, or with `check_mode` only tell; what the module returns. Raises `Trouble`."""
        planned = check_mode or self._wanted["state"] == "planned"
        job = self._job()
        if job is not None and job["state"] in ALIVE:
            return self._attach(job, planned)
        before = self._look()
        if self._is_there(before):
            return dict(_told(before), changed=False, action="none", diff=_diff(self._place(before)))
        self._check(before)
        resumed = job if job is not None and self._wanted["resume"] else None
        if planned:
            return self._plan(before, resumed)
        if job is not None and resumed is None:
            self._tool.clean_up(job["job"])
        return self._move(before, resumed)

    def _job(self):
        """The domain's migration that is not over, or None. Raises `Trouble` if it goes elsewhere."""
        jobs = self._tool.jobs_of(self._wanted["name"])
        for job in jobs:
            there = job["domain"]["target_uri"]
            if there != self._wanted["dest_uri"] and (job["state"] in ALIVE or self._wanted["resume"]):
                raise Trouble(
                    f"job {job['job']}, {job['state']}, moves the domain to {there}; state: aborted gives it up",
                    job=job["job"],
                    status=job,
                )
        return jobs[0] if jobs else None

    def _look(self):
        """The domain here, and there."""
        name = self._wanted["name"]
        here = self._here.domain(name)
        return here, self._there.domain(name if here is None else here["uuid"])

    def _is_there(self, looked):
        """Whether nothing needs to be done."""
        here, there = looked
        if there is None:
            return False
        if here is None:
            return True
        if _active(there):
            return not _active(here)
        return not _active(here) and self._wanted["offline"] and not self._wanted["undefine_source"]

    def _check(self, looked):
        """Raise `Trouble` where it cannot be done."""
        here, there = looked
        facts = _told(looked)
        if here is None:
            raise Trouble(
                f"there is no domain {self._wanted['name']!r}, neither at {self._here.uri} nor at {self._there.uri}",
                **facts,
            )
        if _active(here) and there is not None and _active(there):
            if self._here.host() == self._there.host():
                raise Trouble(f"{self._there.uri} leads to this host, where {here['name']} is; name another", **facts)
            raise Trouble(
                f"{here['name']} is active in both places: {here['state']} at {self._here.uri}, {there['state']} at "
                f"{self._there.uri}; end the one that is not to be",
                **facts,
            )
        if not _active(here) and not self._wanted["offline"]:
            raise Trouble(
                f"{here['name']} does not run; start it, or set offline: true, which copies its images",
                **facts,
            )

    def _plan(self, before, resumed):
        migrates = self._wanted["state"] == "migrated"
        told = dict(_told(before), changed=migrates)
        if resumed is not None:
            return dict(told, action="resume", job=resumed["job"], status=resumed, diff=_diff(self._place(before)))
        plan = self._tool.plan(self._words(before))
        after = {
            "domain": before[0]["name"],
            "at": self._there.uri,
            "disks": dict(
                {disk["target"]: disk["source"] for disk in before[0]["disks"]},
                **{disk["name"]: disk["destination"] for disk in plan["disks"]},
            ),
        }
        diff = _diff(self._place(before), after if migrates else None)
        return dict(told, action="start" if migrates else "plan", plan=plan, diff=diff)

    def _move(self, before, resumed):
        words = self._words(before) if resumed is None else ["--resume", resumed["job"], *self._changes()]
        run = self._tool.begin(words)
        action = "start" if resumed is None else "resume"
        if not self._wanted["wait"]:
            job = run.under_way(lambda: self._tool.jobs_of(before[0]["uuid"]))
            if job is not None:
                return dict(_told(before), changed=True, action=action, job=job["job"], status=job)
        result = run.result()
        return self._arrived(before, action=action, job=result["job"], result=result)

    def _attach(self, job, planned):
        name = job["job"]
        if not planned and self._wanted["wait"]:
            before = self._look()
            job = self._tool.follow(name)
            outcome = job.get("outcome")
            if outcome is None or outcome["exit_code"]:
                told = outcome["text"] if outcome else f"it is {job['state']}"
                raise Trouble(f"job {name}: {sentence(told, job['guest'], job['next'])}", job=name, status=job)
            return self._arrived(before, action="attach", job=name, status=job)
        changed = self._wanted["state"] == "migrated"
        return dict(_told(self._look()), changed=changed, action="attach", job=name, status=job)

    def _arrived(self, before, **told):
        after = self._look()
        diff = _diff(self._place(before), self._place(after))
        return dict(_told(after), changed=True, diff=diff, **told)

    def _place(self, looked):
        """Where the domain and its images are, as the diff shows it."""
        here, there = looked
        at_source = here is not None and (_active(here) or there is None)
        domain = here if at_source else there
        if domain is None:
            return {}
        return {
            "domain": domain["name"],
            "at": self._here.uri if at_source else self._there.uri,
            "disks": {disk["target"]: disk["source"] for disk in domain["disks"]},
        }

    def _words(self, before):
        """The command's words for a migration from the beginning."""
        wanted = self._wanted
        words = ["--connect", wanted["uri"], "--domain", before[0]["uuid"], "--desturi", wanted["dest_uri"]]
        for name, option in (
            ("shared_base", "--copy-storage-inc"),
            ("persistent", "--persistent"),
            ("undefine_source", "--undefinesource"),
        ):
            words += [option] if wanted[name] else []
        words += [] if _active(before[0]) else ["--offline"]
        words += ["--migrate-disks", ",".join(wanted["disks"])] if wanted["disks"] else []
        for target, path in sorted((wanted["paths"] or {}).items()):
            words += ["--disk", f"{target}={path}"]
        words += ["--target-pool", wanted["pool"]] if wanted["pool"] else []
        words += ["--verify", wanted["verify"]] if wanted["verify"] else []
        return [*words, *self._changes(), *wanted["options"]]

    def _changes(self):
        """Those that a resumed migration takes, too."""
        words = []
        for name in ("bandwidth", "downtime", "max_rounds", "on_stall"):
            if self._wanted[name] is not None:
                words += ["--" + name.replace("_", "-"), str(self._wanted[name])]
        return [*words, "--retry", str(self._wanted["retry"])] if self._wanted["retry"] else words


def _active(domain):
    return domain["state"] != SHUT_OFF


def _told(looked):
    here, there = looked
    known = here or there
    return {
        "here": here["state"] if here else None,
        "there": there["state"] if there else None,
        "uuid": known["uuid"] if known else None,
    }


def _diff(before, after=None):
    return {"before": before, "after": before if after is None else after}
