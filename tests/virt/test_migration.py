"""How a domain's migration is begun."""

from __future__ import annotations

import uuid
from unittest.mock import AsyncMock, Mock

import pytest

from qemu_blkmig.errors import Refused
from qemu_blkmig.virt.connection import Connection
from qemu_blkmig.virt.migration import DomainMigration, Wish


async def test_a_connection_for_a_domain_that_is_not_there_any_more_does_not_stay(
    daemonless: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Connection(daemonless.handle, daemonless.uri, daemonless.who)
    monkeypatch.setattr(own, "close", closed := AsyncMock())
    monkeypatch.setattr(Connection, "open", AsyncMock(return_value=own))
    gone = Mock(UUIDString=lambda: str(uuid.uuid4()))
    with pytest.raises(Refused, match="has no domain"):
        await DomainMigration.begin(daemonless, gone, daemonless, Wish(None, ""))
    closed.assert_awaited_once_with()
