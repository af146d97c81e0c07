# Copyright (c) The qemu-blkmig developers
# GNU General Public License v2.0 or later (see COPYING or https://www.gnu.org/licenses/gpl-2.0.txt)
# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes wrong, as a module tells it."""

from __future__ import annotations


class Trouble(Exception):
    """`what` went wrong; `facts`: what the module returns beside it, such as the error of the command line."""

    def __init__(self, what, **facts):
        super().__init__(what)
        self.what = what
        self.facts = facts


def of_error(error, **facts):
    """The trouble that an error object of the command line tells of: what, how things stand, what to do next."""
    what = f"disk {error['disk']}: {error['what']}" if error.get("disk") else error["what"]
    return Trouble(sentence(what, error.get("state"), error.get("advice")), error=error, **facts)


def sentence(what, state, advice):
    """What happened, how things stand, what to do next; the latter two as far as they are known."""
    return what + (f"; now: {state}" if state else "") + (f"; next: {advice}" if advice else "")
