"""What a worker refuses to be started with."""

from __future__ import annotations

import pytest

from proto.control import Role
from proto.errors import SettingsError
from proto.settings import EngineSettings, LedgerSettings, RpcSettings, WorkerSettings
from worker.service import TierParts, WorkerContext, WorkerService


def never(context: WorkerContext) -> TierParts:
    raise AssertionError("the name was taken")


@pytest.mark.parametrize("name", ["工人-0", "ö", "a b", "a,b", "a\n", "x" * 129])
def test_a_name_that_cannot_stand_in_a_header(name: str) -> None:
    ledger = LedgerSettings(redis="redis://127.0.0.1:1")
    with pytest.raises(SettingsError, match="--worker-id"):
        WorkerService(Role.DECODE, EngineSettings(), WorkerSettings(worker_id=name), ledger, never, RpcSettings())
