"""What ssh says when it fails, and what to do about it: its words are kept, advice is added."""

from __future__ import annotations

from qemu_blkmig.errors import BlkmigError, DestinationFailed, Refused

_CONFIGURATION = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "its key is not the one that is known: find out why; if the host was "
     "installed anew: ssh-keygen -R {host}, then ssh {host} once by hand, and compare the fingerprint"),
    ("Host key verification failed", "its key is not known here: ssh {host} once by hand, as the user that runs "
     "qemu-blkmig, and compare the fingerprint"),
    ("Too many authentication failures", "name the key for this host in ~/.ssh/config (IdentityFile, IdentitiesOnly)"),
    ("Permission denied", "`ssh -o BatchMode=yes {host} true` must work without a question: put your public key into "
     "~/.ssh/authorized_keys there, have its private key here unencrypted or in ssh-agent, name the user as "
     "ssh://USER@{host}/..."),
    ("Could not resolve hostname", "write the name as DNS, /etc/hosts or ~/.ssh/config know it"),
    ("Bad configuration option", "this ssh is too old, or its configuration is damaged: try ssh {host} by hand"),
    ("no matching ", "both ends of ssh are too different in age: see ssh -v {host}"),
)  # fmt: skip
"""Words of ssh (openssh 9.2, seen and read) that tell of what a person must mend."""
_NETWORK = (
    ("Connection refused", "is sshd running there, and is this its port? ssh://HOST:PORT/..."),
    ("No route to host", "is {host} up, and the network between the two?"),
    ("Network is unreachable", "is the network up here?"),
    ("timed out", "is {host} up? a firewall may drop what is sent to it"),
    ("Connection closed by", "sshd there has closed the connection: see its log (journalctl -u ssh)"),
    ("Connection reset by", "see the log of sshd there (journalctl -u ssh)"),
)
NOT_FOUND = 127
"""A shell's exit status for a command that it cannot find."""
NOT_RUN = 126


def failure_of(said: str, host: str, remote_command: str, status: int | None) -> BlkmigError:
    """The error for an ssh to `host` that ended with `status` and these words."""
    words = said.strip() or f"ssh ended with status {status}"
    if status == NOT_FOUND:
        return Refused(
            f"there is no {remote_command} on {host}: {words}",
            advice=f"install qemu-blkmig on {host}, or say by --remote-command how it is called there",
        )
    if status == NOT_RUN:
        return Refused(f"{remote_command} cannot be run on {host}: {words}", advice="see its permissions there")
    for part, advice in _CONFIGURATION:
        if part in words:
            return Refused(f"ssh to {host} failed: {words}", advice=advice.format(host=host))
    for part, advice in _NETWORK:
        if part in words:
            return DestinationFailed(f"ssh to {host} failed: {words}", advice=advice.format(host=host))
    if status not in (None, 255):
        return DestinationFailed(
            f"the agent on {host} ended with status {status}: {words}",
            advice=f"try by hand: ssh {host} {remote_command} --version; the same version must be on both hosts",
        )
    return DestinationFailed(f"ssh to {host} failed: {words}", advice=f"try by hand: ssh {host} true")


def refusal_of_forward(said: str, host: str) -> Refused:
    """The error for a socket that `host` does not let us forward."""
    return Refused(
        f"sshd on {host} does not let us forward a unix socket: {said}",
        advice="its sshd_config must not say AllowStreamLocalForwarding no, DisableForwarding yes or PermitOpen for "
        "this user, and a key that is restricted in authorized_keys needs port-forwarding, too, without permitopen",
    )
