"""The laboratory's two hosts and their network do what the tests over ssh rely on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.hosts import PORT, Hosts, two_hosts
from integration.lab import LabError, wait_until
from integration.network import Network


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts for all of this file."""
    with two_hosts() as made:
        yield made


def ssh(hosts: Hosts, *command: str, options: tuple[str, ...] = ()) -> list[str]:
    return [*hosts.enter, "ssh", "-o", "BatchMode=yes", "-p", str(PORT), *options, "hostb", *command]


def test_each_host_has_a_name_and_a_boot_id_of_its_own_and_does_not_see_the_others_folder(hosts: Hosts) -> None:
    (hosts.near / "mine").touch()
    (hosts.far / "theirs").touch()
    there = subprocess.check_output(
        ssh(hosts, f"hostname; cat /proc/sys/kernel/random/boot_id; ls {hosts.near}"), text=True
    )
    name, boot_id, folder = there.split()
    assert name == "hostb"
    assert folder == "hostb"
    assert hosts.run("hostname") == "hosta\n"
    assert hosts.run("cat", "/proc/sys/kernel/random/boot_id").strip() != boot_id
    assert "mine" in hosts.run("ls", hosts.near)
    assert hosts.run("ls", hosts.far) == ""


def test_a_process_of_hostb_is_found_by_the_number_that_it_has_there(hosts: Hosts) -> None:
    with subprocess.Popen(ssh(hosts, "echo $$; exec sleep 100"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        inside = int(process.stdout.readline())
        outside = hosts.outside(inside)
        wait_until(lambda: Path(f"/proc/{outside}/comm").read_text() == "sleep\n", "sleep")
        assert outside != inside
        hosts.run("kill", inside, far=True)


def test_a_disk_is_read_in_hostb_through_a_forwarded_unix_socket(hosts: Hosts, tmp_path: Path) -> None:
    disk, socket = tmp_path / "disk", hosts.near / "nbd"
    disk.write_bytes(b"what is read" * 1000)
    serve = [*hosts.enter, "qemu-nbd", "-r", "-f", "raw", "-k", str(socket), str(disk)]
    with subprocess.Popen(serve) as server:
        wait_until(socket.exists, "qemu-nbd")
        forward = ("-o", "ExitOnForwardFailure=yes", "-R", f"/run/forwarded:{socket}")
        read = "nbdcopy nbd+unix:///?socket=/run/forwarded - | head -c 12000"
        assert subprocess.check_output(ssh(hosts, read, options=forward)) == disk.read_bytes()
        assert server.wait(10) == 0


def test_without_stream_forwarding_the_forward_fails(hosts: Hosts) -> None:
    hosts.start_sshd("AllowStreamLocalForwarding no")
    try:
        forward = ("-o", "ExitOnForwardFailure=yes", "-R", "/run/refused:/nowhere")
        assert subprocess.run(ssh(hosts, "true", options=forward), capture_output=True, check=False).returncode == 255
    finally:
        hosts.start_sshd()


@pytest.mark.parametrize("how", ["cut", "reset", "lost", "killed", "power"])
def test_a_connection_ends_when_the_network_the_host_or_its_sshd_does(hosts: Hosts, how: str) -> None:
    network = Network(hosts)
    alive = ("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2")
    with subprocess.Popen(
        ssh(hosts, "echo up; exec sleep 100", options=alive), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        match how:
            case "cut":
                network.down()
                process.wait(20)
                network.up()
            case "reset":
                with network.resetting():
                    process.wait(20)
            case "lost":
                with network.losing(1.0):
                    process.wait(20)
            case "killed":
                assert network.kill_connections()
            case "power":
                hosts.reboot()
        assert process.wait(20) == 255
    network.kill_connections()
    subprocess.run(ssh(hosts, "true"), check=True)


def test_a_network_that_is_up_again_is_there_at_once(hosts: Hosts) -> None:
    network = Network(hosts)
    network.down()
    # Where hostb was is forgotten.
    time.sleep(2)
    # As a connection does that has died with something left to be sent: hostb is looked for, three times in 3 s.
    with subprocess.Popen(ssh(hosts, "true"), stderr=subprocess.DEVNULL):
        time.sleep(2.5)
        network.up()
        assert subprocess.check_output(ssh(hosts, "hostname"), text=True) == "hostb\n"


def test_a_reboot_changes_the_boot_id_and_empties_run_but_keeps_the_disk(hosts: Hosts) -> None:
    (hosts.far / "target" / "image").write_text("kept")
    hosts.run("touch", "/run/gone", far=True)
    before = hosts.run("cat", "/proc/sys/kernel/random/boot_id", far=True)
    hosts.reboot()
    assert hosts.run("cat", "/proc/sys/kernel/random/boot_id", far=True) != before
    assert hosts.run("cat", hosts.far / "target" / "image", far=True) == "kept"
    with pytest.raises(LabError):
        hosts.run("ls", "/run/gone", far=True)


def test_the_network_can_be_slow_and_far_away(hosts: Hosts) -> None:
    network = Network(hosts)
    network.limit(8)
    try:
        start = time.monotonic()
        subprocess.run(ssh(hosts, "head -c 1000000 /dev/urandom"), stdout=subprocess.DEVNULL, check=True)
        assert time.monotonic() - start > 0.8
    finally:
        network.limit(None)
    with network.delayed(0.1) as port:
        start = time.monotonic()
        near = ("-o", "HostName=127.0.0.1", "-o", f"HostKeyAlias=[10.77.0.2]:{PORT}", "-p", str(port))
        subprocess.run(
            [*hosts.enter, "ssh", "-o", "BatchMode=yes", *near, "hostb", "true"], check=True, stdin=subprocess.DEVNULL
        )
        assert time.monotonic() - start > 0.8


@pytest.mark.parametrize("mbit", [40, 1000, 10000])
def test_a_line_that_was_not_looked_after_for_some_milliseconds_makes_up_for_it(hosts: Hosts, mbit: int) -> None:
    network = Network(hosts)
    network.limit(mbit)
    try:
        for far in (False, True):
            (shape,) = json.loads(hosts.run("tc", "-j", "qdisc", "show", "dev", "net0", far=far))
            assert shape["options"]["rate"] == mbit * 125000
            assert shape["options"]["burst"] >= 0.0039 * mbit * 125000
    finally:
        network.limit(None)


def test_nothing_is_left_of_two_hosts() -> None:
    with two_hosts() as hosts:
        subprocess.run(ssh(hosts, "setsid sleep 1000 >/dev/null 2>&1 &"), check=True, stdin=subprocess.DEVNULL)
        wait_until(lambda: any(b"sleep\x001000" in _command(pid) for pid in hosts.processes()), "the process")
        inside = hosts.processes()
    assert not hosts.near.exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in inside)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
