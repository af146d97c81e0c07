# Copyright (c) The qemu-blkmig developers
# GNU General Public License v2.0 or later (see COPYING or https://www.gnu.org/licenses/gpl-2.0.txt)
# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done for a domain that is to be at another host, by where it is, and what is under way."""

from __future__ import annotations

import pytest
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.migration import Migration
from ansible_collections.qemu_blkmig.libvirt.plugins.module_utils.trouble import Trouble

UUID = "6b0d5a36-4b7c-4b8e-9d54-0f8a4f6f1c11"
HERE, THERE = "qemu:///system", "qemu+ssh://hostb/system"


class Libvirt:
    """One end; `state` None: the domain is not known there."""

    def __init__(self, uri, state):
        self.uri = uri
        self.state = state

    def host(self):
        return self.uri

    def domain(self, name):
        if self.state is None or name not in ("web1", UUID):
            return None
        disks = [{"target": "vda", "source": "/srv/web1.qcow2", "moves": True}]
        return {"name": "web1", "uuid": UUID, "memory": 1, "disks": disks, "state": self.state}


class Tool:
    """Notes what is asked of it; a migration that is begun brings the domain over."""

    def __init__(self, here, there, jobs=()):
        self.asked = []
        self._here, self._there = here, there
        self._jobs = list(jobs)

    def jobs_of(self, name):
        return self._jobs

    def clean_up(self, job):
        self.asked.append(("clean up", job))

    def follow(self, job):
        self.asked.append(("follow", job))
        self._arrive()
        return {"job": job, "state": "finished", "outcome": {"exit_code": 0, "text": "migrated"}}

    def plan(self, words):
        self.asked.append(("plan", words))
        return {"ready": True, "disks": [{"name": "vda", "destination": "/big/web1.qcow2"}]}

    def begin(self, words):
        self.asked.append(("begin", words))
        return self

    def result(self):
        self._arrive()
        return {"job": "1a2b"}

    def under_way(self, find):
        return {"job": "1a2b", "state": "running"}

    def _arrive(self):
        self._here.state, self._there.state = None, "running"


def wanted(**given):
    usual = dict.fromkeys(["disks", "paths", "pool", "bandwidth", "downtime", "max_rounds", "on_stall", "verify"])
    flags = dict.fromkeys(["persistent", "undefine_source", "resume", "wait"], True)
    off = dict.fromkeys(["shared_base", "offline"], False)
    ends = {"name": "web1", "uri": HERE, "dest_uri": THERE, "state": "migrated", "retry": 0, "options": []}
    return {**usual, **flags, **off, **ends, **given}


def job(state, there=THERE):
    domain = {"name": "web1", "uuid": UUID, "target_uri": there}
    return {"job": "9f9f", "state": state, "domain": domain, "guest": "the guest is the source's", "next": None}


def tried(here, there, jobs=(), check_mode=False, **given):
    """What was asked of the tool, and what the module returns."""
    ends = Libvirt(HERE, here), Libvirt(THERE, there)
    tool = Tool(*ends, jobs)
    told = Migration(wanted(**given), tool, *ends).run(check_mode)
    return tool.asked, told


def test_a_domain_that_runs_here_is_moved_by_its_uuid():
    asked, told = tried("running", None, downtime=500, paths={"vda": "/big/web1.qcow2"}, options=["--p2p"], retry=3)
    words = [
        "--connect", HERE, "--domain", UUID, "--desturi", THERE, "--persistent", "--undefinesource",
        "--disk", "vda=/big/web1.qcow2", "--downtime", "500", "--retry", "3", "--p2p",
    ]  # fmt: skip
    assert asked == [("begin", words)]
    assert (told["changed"], told["action"], told["job"]) == (True, "start", "1a2b")
    assert (told["here"], told["there"]) == (None, "running")
    assert told["diff"]["before"]["at"] == HERE and told["diff"]["after"]["at"] == THERE


@pytest.mark.parametrize(("here", "there"), [(None, "running"), ("shut off", "running"), (None, "shut off")])
def test_a_domain_that_is_there_and_not_active_here_is_left_alone(here, there):
    asked, told = tried(here, there)
    assert asked == [] and told["changed"] is False and told["action"] == "none"
    assert told["diff"]["before"] == told["diff"]["after"]


@pytest.mark.parametrize(
    ("here", "there", "why"),
    [
        ("running", "running", "active in both places"),
        ("running", "paused", "active in both places"),
        ("shut off", None, "does not run"),
        ("shut off", "shut off", "does not run"),
        (None, None, "there is no domain"),
    ],
)
@pytest.mark.parametrize("check_mode", [False, True])
def test_what_cannot_be_done_fails(here, there, why, check_mode):
    with pytest.raises(Trouble, match=why) as trouble:
        tried(here, there, check_mode=check_mode)
    assert (trouble.value.facts["here"], trouble.value.facts["there"]) == (here, there)


def test_a_destination_that_is_this_host_is_not_taken_for_a_second_place():
    end = Libvirt(HERE, "running")
    with pytest.raises(Trouble, match="leads to this host"):
        Migration(wanted(), Tool(end, end, []), end, end).run(False)


def test_check_mode_runs_the_preflight_and_shows_where_disks_would_be():
    asked, told = tried("running", None, check_mode=True)
    assert [what for what, _words in asked] == ["plan"]
    assert told["changed"] is True and told["plan"]["ready"]
    assert told["diff"]["before"]["disks"] == {"vda": "/srv/web1.qcow2"}
    assert told["diff"]["after"] == {"domain": "web1", "at": THERE, "disks": {"vda": "/big/web1.qcow2"}}


def test_a_plan_changes_nothing():
    asked, told = tried("running", None, state="planned")
    assert [what for what, _words in asked] == ["plan"]
    assert told["changed"] is False and told["diff"]["before"] == told["diff"]["after"]


def test_a_domain_that_does_not_run_is_copied_when_that_is_wanted_and_once():
    asked, _told = tried("shut off", None, offline=True)
    assert "--offline" in asked[0][1]
    asked, told = tried("shut off", "shut off", offline=True, undefine_source=False)
    assert asked == [] and told["changed"] is False


@pytest.mark.parametrize("state", ["running", "busy"])
def test_a_migration_under_way_is_waited_for(state):
    asked, told = tried("running", "paused", [job(state)])
    assert asked == [("follow", "9f9f")]
    assert told["changed"] is True and told["action"] == "attach" and told["there"] == "running"


def test_check_mode_and_wait_false_only_tell_of_a_migration_under_way():
    for given in ({"check_mode": True}, {"wait": False}):
        asked, told = tried("running", "paused", [job("running")], **given)
        assert asked == [] and told["action"] == "attach" and told["status"]["job"] == "9f9f"


def test_a_suspended_migration_goes_on_or_is_given_up():
    asked, told = tried("running", None, [job("suspended")], bandwidth="50", paths={"vda": "/big"})
    assert asked == [("begin", ["--resume", "9f9f", "--bandwidth", "50"])]
    assert told["action"] == "resume"
    asked, told = tried("running", None, [job("suspended")], resume=False)
    assert [what for what, _words in asked] == ["clean up", "begin"]
    assert told["action"] == "start"


def test_a_migration_to_another_host_is_not_touched():
    for state in ("running", "suspended"):
        with pytest.raises(Trouble, match=r"moves the domain to .*://hostc"):
            tried("running", None, [job(state, "qemu+ssh://hostc/system")])


def test_a_migration_that_was_waited_for_and_failed_fails():
    ends = Libvirt(HERE, "running"), Libvirt(THERE, None)
    tool = Tool(*ends, [job("running")])
    tool.follow = lambda name: dict(job("suspended"), next="qemu-blkmig resume 9f9f")
    with pytest.raises(Trouble, match="it is suspended; now: the guest is the source's; next: qemu-blkmig resume"):
        Migration(wanted(), tool, *ends).run(False)


def test_without_wait_the_job_is_told():
    asked, told = tried("running", None, wait=False)
    assert asked[0][0] == "begin" and told["job"] == "1a2b" and told["here"] == "running"
