"""What a journal notes of where a job runs and what was asked for; and what a pause was spent on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from qemu_blkmig.destination.protocol import HelloReply
from qemu_blkmig.job.environment import environment, libvirt_version, terms
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import CopyOptions, MigrateOptions, Selection, Target, Transfer
from qemu_blkmig.job.place import Local, Ssh
from qemu_blkmig.job.record import Managed, Record
from qemu_blkmig.job.reporting import Stopwatch
from qemu_blkmig.qmp.monitor import CommandFailed


class Monitor:
    """A QEMU that answers so; what it does not know it refuses."""

    def __init__(self, **answers: Any) -> None:
        self._answers = answers

    async def execute(self, command: str) -> Any:
        """See `qmp.monitor.Monitor`."""
        try:
            return self._answers[command.replace("-", "_")]
        except KeyError:
            raise CommandFailed("QEMU", command, "CommandNotFound", "unknown") from None


VERSION = {"qemu": {"major": 8, "minor": 2, "micro": 1}, "package": ""}


async def test_hosts_and_versions_are_noted_as_far_as_they_are_told() -> None:
    source: Any = Monitor(
        query_name={"name": "web1"}, query_kvm={"enabled": True, "present": True}, query_version=VERSION
    )
    target: Any = Monitor(query_version={**VERSION, "package": " (Debian 1:8.2.1)"})
    found = await environment(source, target, HelloReply("9.9", 1, "hostb"))
    assert found["Guest"] == "web1" and found["Accelerator"] == "KVM"
    assert found["Source QEMU"] == "8.2.1" and found["Destination QEMU"] == "8.2.1 (Debian 1:8.2.1)"
    assert found["Destination host"] == "hostb" and found["qemu-blkmig at the destination"] == "9.9"
    silent: Any = Monitor()
    assert set(await environment(silent, None, None)) == {"Source host", "qemu-blkmig"}


def test_a_libvirt_tells_its_version_in_one_number() -> None:
    assert libvirt_version(11_003_002) == "11.3.2"


def test_what_was_asked_for_is_noted_without_the_command_that_launches() -> None:
    launched = Target(Local("/new"), launch="qemu -object secret,data=hush")
    noted = terms(Record("job", "", migrate=MigrateOptions("/qmp", launched, downtime=0.2)))
    assert noted["Downtime limit"] == "200 ms" and noted["Bandwidth limit"] == "none"
    assert "hush" not in str(noted)
    copied = CopyOptions(
        Target(Local("/new")), image="/old", transfer=Transfer(bandwidth=3 << 20, group=("a", 5 << 20))
    )
    assert terms(Record("job", "", copy=copied))["Bandwidth limit"] == "3.0 MiB/s"
    options = ManagedOptions(
        "vm", "qemu+ssh://hostb/system", Ssh("hostb", "/"), selection=Selection(disks=("vda", "vdb"))
    )
    managed = Managed(options, "uuid", "vm", "vm")
    assert terms(Record("job", "", managed=managed))["Disks"] == "vda, vdb"
    assert terms(Record("job", "")) == {}


def test_the_steps_of_the_last_pause_follow_each_other() -> None:
    now = iter([1.5, 1.75, 12.0, 12.5, 13.0])
    clock: Any = SimpleNamespace(now=lambda: next(now))
    watch = Stopwatch(clock, Any)  # type: ignore[arg-type]
    watch.paused(1.0)
    watch.step("given back")
    watch.step("too late")
    watch.paused(11.0)
    watch.step("last round")
    watch.step("read back")
    watch.step("last round")
    assert watch.steps == {"last round": 1.5, "read back": 0.5}
