"""What `virsh-blkmigrate` understands of a command line, and what it refuses of it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from qemu_blkmig.cli.virsh_blkmigrate import main, parser, wish
from qemu_blkmig.cli.virsh_options import REFUSED, REFUSED_VALUES
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import OnStall
from qemu_blkmig.job.place import Local, Ssh

URI = "qemu+ssh://hostb/system"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No job of the machine's is seen."""
    monkeypatch.setenv("QEMU_BLKMIG_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("QEMU_BLKMIG_SSH", raising=False)


def _wish(*words: str) -> ManagedOptions:
    return wish(parser().parse_args(words))


def test_the_usual_call_is_live_and_goes_by_the_uri_s_ssh() -> None:
    wanted = _wish("--live", "web1", "qemu+ssh://root@hostb:2222/system")
    assert (wanted.domain, wanted.target_uri) == ("web1", "qemu+ssh://root@hostb:2222/system")
    assert wanted.place == Ssh("hostb", "/", "root", 2222)
    assert wanted.live and not wanted.persistent and not wanted.selection.shared_base
    assert wanted.migrate_uri is None and wanted.source_uri is None


def test_a_bandwidth_or_timeout_of_0_is_no_limit_as_with_virsh() -> None:
    wanted = _wish("web1", URI, "--bandwidth", "0", "--timeout", "0")
    assert wanted.transfer.bandwidth is None and wanted.timeout is None


def test_options_may_stand_between_the_domain_and_its_destination_as_with_virsh() -> None:
    wanted = _wish("web1", "--persistent", URI, "--suspend", "tcp://hostb:49152")
    assert (wanted.domain, wanted.target_uri, wanted.migrate_uri) == ("web1", URI, "tcp://hostb:49152")
    assert wanted.persistent and wanted.suspend


@pytest.mark.parametrize("words", [("--suspend", "--", "-p", URI), ("--desturi", URI, "--suspend", "--", "-p")])
def test_a_domain_whose_name_looks_like_an_option_is_named_behind_two_dashes(words: Sequence[str]) -> None:
    wanted = _wish(*words)
    assert (wanted.domain, wanted.target_uri, wanted.suspend) == ("-p", URI, True)


@pytest.mark.parametrize(
    "words",
    [
        ("--desturi", URI, "--domain", "web1", "--migrateuri", "tcp://hostb"),
        ("--domain", "web1", URI, "tcp://hostb"),
        ("web1", "--desturi", URI, "tcp://hostb"),
        ("web1", URI, "--migrateuri", "tcp://hostb"),
    ],
)
def test_domain_and_destination_may_be_named_as_options(words: Sequence[str]) -> None:
    wanted = _wish(*words)
    assert (wanted.domain, wanted.target_uri, wanted.migrate_uri) == ("web1", URI, "tcp://hostb")


def test_virsh_s_options_have_virsh_s_meaning(tmp_path: Path) -> None:
    xml, persistent = tmp_path / "a.xml", tmp_path / "b.xml"
    xml.write_text("<domain/>")
    persistent.write_text("<domain><name/></domain>")
    wanted = _wish(
        "-c", "qemu:///system", "--no-live", "--p2p", "--persistent", "--undefinesource", "--copy-storage-inc",
        "--migrate-disks", "vda,vdb", "--bandwidth", "100", "--timeout", "60", "--timeout-suspend", "--auto-converge",
        "--auto-converge-initial", "30", "--auto-converge-increment", "5", "--dname", "web2", "--xml", str(xml),
        "--persistent-xml", str(persistent), "--listen-address", "0.0.0.0", "--tls", "--tls-destination", "b.example",
        "--migrateuri", "tcp://hostb", "--abort-on-error", "--unsafe",
        "--change-protection", "--graphicsuri", "spice://hostb:5900", "web1", URI,
    )  # fmt: skip
    assert wanted == ManagedOptions(
        domain="web1", source_uri="qemu:///system", target_uri=URI, place=Ssh("hostb", "/"), live=False,
        peer_to_peer=True, persistent=True, undefine_source=True, timeout=60, auto_converge=True,
        auto_converge_initial=30, auto_converge_increment=5, dname="web2", xml="<domain/>",
        persistent_xml="<domain><name/></domain>", listen_address="0.0.0.0", tls=True, tls_destination="b.example",
        migrate_uri="tcp://hostb", abort_on_error=True, unsafe=True, graphics_uri="spice://hostb:5900",
        selection=wanted.selection, transfer=wanted.transfer,
    )  # fmt: skip
    assert wanted.selection.disks == ("vda", "vdb") and wanted.selection.shared_base
    assert wanted.transfer.bandwidth == 100 << 20


def test_our_own_options_are_understood() -> None:
    wanted = _wish(
        "web1", URI, "--disk", "vda=/a b", "--disk", "vdb=/c", "--target-pool", "vm", "--downtime", "500",
        "--on-stall", "throttle", "--switchover", "manual", "--verify", "full",
    )  # fmt: skip
    assert wanted.paths == {"vda": "/a b", "vdb": "/c"} and wanted.pool == "vm"
    assert wanted.downtime == 0.5 and wanted.on_stall is OnStall.THROTTLE and wanted.switchover.waits
    assert wanted.verify.value == "full"


@pytest.mark.parametrize(
    ("uri", "agent", "place"),
    [
        ("qemu+ssh://[fd00::2]:22/system", None, Ssh("fd00::2", "/", None, 22)),
        ("qemu+libssh2://admin@hostb/system", None, Ssh("hostb", "/", "admin")),
        ("qemu+ssh://admin%40corp@[fe80::2%25eth0]/system", None, Ssh("fe80::2%eth0", "/", "admin@corp")),
        ("qemu+tls://hostb/system", "ssh://root@hostb", Ssh("hostb", "/", "root")),
        ("qemu+ssh://hostb/system", "ssh://other:2222/", Ssh("other", "/", None, 2222)),
        ("qemu:///session", "local:/", Local("/")),
    ],
)
def test_the_agent_is_reached_as_libvirt_is_unless_it_is_named(uri: str, agent: str | None, place: object) -> None:
    assert _wish("web1", uri, *(["--agent", agent] if agent else [])).place == place


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "name a domain and the destination's libvirt"),
        (["web1", URI, "a", "b"], "unrecognized arguments: b"),
        (["web1", URI, "a", "--domain", "web2"], "there is no use for a: DOMAIN, DESTURI and MIGRATEURI are all given"),
        (["web1", URI, "--pers"], "unrecognized arguments: --pers"),
        (["web1", "qemu+tcp://hostb/system"], "does not tell how the host's storage is reached"),
        (["web1", "qemu:///system"], "names no other host"),
        (["web1", "qemu+ssh:///system"], "names no other host"),
        (["web1", "--", URI, "a", "-b"], "unrecognized arguments: -b"),
        (["web1", "qemu+ssh://hostb:99999/system"], "port"),
        (["web1", "qemu+ssh://hostb/system?keyfile=/k"], "knows nothing of keyfile"),
        (["web1", "qemu+ssh://[::1/system"], "Invalid IPv6 URL"),
        (["web1", "xen+ssh://hostb/system"], "not the URI of a QEMU host's libvirt"),
        (["web1", URI, "--agent", "ssh://hostb/srv"], "--agent names a host, no directory"),
        (["web1", URI, "--disk", "vda"], "write TARGET=PATH"),
        (["web1", URI, "--disk", "vda=a"], "write TARGET=PATH"),
        (["web1", URI, "--disk", "vda=/a", "--disk", "vda=/b"], "two paths for vda"),
        (["web1", URI, "--copy-storage-all", "--copy-storage-inc"], "contradict each other"),
        (["web1", URI, "--flatten", "no"], "--flatten no is of no use without --copy-storage-inc"),
        (["web1", URI, "--base", "/b"], "--base is of no use without --copy-storage-inc"),
        (["web1", URI, "--offline"], "--offline needs --persistent"),
        (["web1", URI, "--offline", "--persistent", "--suspend"], "--suspend is for a domain that runs"),
        (
            ["web1", URI, "--offline", "--persistent", "--switchover", "manual"],
            "--switchover is for a domain that runs",
        ),
        (["web1", URI, "--offline", "--persistent", "tcp://hostb"], "--migrateuri is for a domain that runs"),
        (["web1", URI, "--timeout-suspend"], "--timeout-suspend is of no use without --timeout"),
        (["web1", URI, "--timeout", "0", "--timeout-suspend"], "--timeout-suspend is of no use without --timeout"),
        (["web1", URI, "--timeout", "-1"], "at least 1 second"),
        (["web1", URI, "--migrate-disks", "vda,"], "--migrate-disks 'vda,': a name is empty"),
        (["web1", URI, "--migrate-disks", ""], "--migrate-disks '': a name is empty"),
        (["web1", URI, "--auto-converge-initial", "0"], "of no use without --auto-converge"),
        (["web1", URI, "--auto-converge-initial", "2"], "of no use without --auto-converge"),
        (["web1", URI, "--auto-converge", "--auto-converge-initial", "100"], "between 1 and 99"),
        (["web1", URI, "--auto-converge", "--auto-converge-increment", "0"], "between 1 and 99"),
        (["web1", URI, "--listen-address", "::"], "--listen-address needs --migrateuri"),
        (["web1", URI, "--migrateuri", ""], "not a migration URI"),
        (["web1", URI, "unix:///tmp/s"], "not a migration URI"),
        (["web1", URI, "tcp://hostb:99999"], "not a migration URI"),
        (["web1", URI, "--dname", ""], "no domain by such a name"),
        (["web1", URI, "--dname", "a/b"], "no domain by such a name"),
        (["web1", URI, "--tls-destination", "b"], "of no use without --tls"),
        (["web1", URI, "--xml", "/none"], "--xml /none cannot be read"),
        (["web1", URI, "--persistent-xml", "/dev/null"], "--persistent"),
        (["--resume", "1a2b", "--persistent"], "--persistent cannot be given with --resume"),
        (["--resume", "1a2b", "web1"], "DOMAIN cannot be given with --resume"),
        (["--resume", "1a2b", "--xml", "/none"], "--xml /none cannot be read"),
        (["--resume=1a2b", "--verify", "full"], "--verify cannot be given with --resume"),
    ],
)
def test_what_makes_no_sense_is_told(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("virsh-blkmigrate: ") and why in told, told


def test_every_option_of_this_machine_s_virsh_is_known() -> None:
    told = subprocess.run(["virsh", "help", "migrate"], check=True, capture_output=True, text=True).stdout
    theirs = set(re.findall(r"^    (?:\[)?(--[a-z0-9-]+)", told, re.MULTILINE))
    ours = {option for action in parser()._actions for option in action.option_strings}
    assert "--undefinesource" in theirs
    assert theirs <= ours, theirs - ours


@pytest.mark.parametrize("option", [*REFUSED, *REFUSED_VALUES])
def test_what_cannot_be_honoured_is_an_error_with_its_reason(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = ["1"] if option in REFUSED_VALUES else []
    assert main([option, *value, "web1", URI]) == 2
    told = capsys.readouterr().err
    assert f"{option} cannot be honoured: {(REFUSED | REFUSED_VALUES)[option]}" in told


@pytest.mark.parametrize(
    "given",
    [
        ["--bandwidth", "1"],
        ["--downtime", "300"],
        ["--on-stall", "abort"],
        ["--switchover", "manual"],
        ["--compare"],
        ["--xml", "/dev/null"],
    ],
)
def test_a_job_that_is_resumed_may_be_told_some_things_anew(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", "1a2b", *given]) == 3
    assert "1a2b" in capsys.readouterr().err


def test_every_option_of_virsh_migrate_is_known() -> None:
    ours = {name for action in parser()._actions for name in action.option_strings}
    assert set(VIRSH.split()) - ours == set()


VIRSH = (  # libvirt 9.0
    "--live --offline --p2p --direct --tunnelled --persistent --undefinesource --suspend --copy-storage-all "
    "--copy-storage-inc --copy-storage-synchronous-writes --change-protection --unsafe --verbose --compressed "
    "--auto-converge --rdma-pin-all --abort-on-error --postcopy --postcopy-after-precopy --postcopy-resume --zerocopy "
    "--migrateuri --graphicsuri --listen-address --dname --timeout --timeout-suspend --timeout-postcopy --xml "
    "--migrate-disks --disks-port --disks-uri --comp-methods --comp-mt-level --comp-mt-threads --comp-mt-dthreads "
    "--comp-xbzrle-cache --auto-converge-initial --auto-converge-increment --persistent-xml --tls "
    "--postcopy-bandwidth --parallel --parallel-connections --bandwidth --tls-destination"
)
