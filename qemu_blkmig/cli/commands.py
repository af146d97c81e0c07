"""Which module has which command. Only the one that is asked for is loaded."""

from __future__ import annotations

from importlib import import_module

from qemu_blkmig.cli.form import Commands

MODULES = {
    "demo_command": ("demo",),
    "transfer_commands": ("check", "migrate", "copy"),
    "resume_command": ("resume",),
    "job_commands": ("jobs", "status", "set", "switchover", "cancel", "cleanup"),
    "report_command": ("report",),
    "receive_command": ("receive",),
    "stream_commands": ("save", "load", "inspect"),
    "hook_commands": ("hooks", "guard"),
}
"""In the order in which help tells of them."""


def add_all(commands: Commands, wanted: str | None = None) -> None:
    """Add every command to the parser; or, where `wanted` is one, just those of its module."""
    modules = [module for module, names in MODULES.items() if wanted in names] or MODULES
    for module in modules:
        import_module(f"qemu_blkmig.cli.{module}").add_all(commands)
