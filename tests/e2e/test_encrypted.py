"""A stack whose tiers speak TLS to each other: it serves as any other does, and takes nobody without a certificate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import openai
import pytest

from proto.errors import NoWorker
from proto.settings import RpcSettings
from service.rpc import TlsFiles, WorkerClient
from tests.support.certificates import self_signed
from tests.support.checkpoints import make_checkpoint
from tests.support.stack import running, stack_settings

NAME = "worker.tandem"


async def test_kv_and_tokens_travel_encrypted(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path, NAME)
    rpc = RpcSettings(
        rpc_tls_cert=str(certificate), rpc_tls_key=str(key), rpc_tls_ca=str(certificate), rpc_tls_name=NAME
    )
    settings = replace(stack_settings(make_checkpoint(tmp_path / "model", "llama"), transports=("grpc",)), rpc=rpc)
    with running(settings) as stack:
        async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none") as client:
            reply = await client.completions.create(
                model="tiny", prompt=list(range(5, 205)), max_tokens=8, extra_body={"ignore_eos": True}
            )
            assert reply.usage is not None
            assert reply.usage.completion_tokens == 8
        worker = stack.ready.workers[0]
        for stranger in (None, TlsFiles(authority=certificate, name=NAME)):
            unknown = WorkerClient(worker.address, stranger)
            with pytest.raises(NoWorker):
                await unknown.health(timeout_s=2.0)
            await unknown.close()
        known = WorkerClient(worker.address, TlsFiles.of(rpc, is_server=False))
        assert (await known.health()).is_ready
        await known.close()
        stack.assert_nothing_leaks()
