"""Clients as they are: many at once, streaming or not, and some that hang up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.stack import Stack, running, stack_settings

MESSAGES = [{"role": "user", "content": "Tell me a story about a block of memory that travelled far. " * 6}]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("clients"), "qwen2")
    with running(stack_settings(checkpoint, prefill=1, decode=2)) as stack:
        yield stack


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=stack.base_url, api_key="none") as client:
        yield client


def test_streaming_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "seed": 5, "temperature": 0.8}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


def test_models_and_health(client: openai.OpenAI, stack: Stack) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert stack.metric("tandem_stage_seconds_count") > 0


async def test_sixty_four_at_once(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none", timeout=120, max_retries=0) as client:

        async def ask(number: int) -> tuple[str, int]:
            options = {"model": "tiny", "prompt": f"{number}: " + "word " * (number % 40), "max_tokens": 16, "seed": 1}
            if number % 2:
                reply = await client.completions.create(**options)  # type: ignore[call-overload]
                return reply.choices[0].text, 1
            stream = await client.completions.create(**options, stream=True)  # type: ignore[call-overload]
            parts = [chunk.choices[0].text async for chunk in stream]
            return "".join(parts), len(parts)

        first = await asyncio.gather(*(ask(number) for number in range(64)))
        again = await asyncio.gather(*(ask(number) for number in range(64)))
    assert [text for text, _ in first] == [text for text, _ in again]
    assert max(parts for _, parts in first) > 3
    await asyncio.to_thread(stack.assert_nothing_leaks)


async def test_twenty_clients_hang_up_midway(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none", max_retries=0) as client:

        async def hang_up(number: int) -> int:
            stream = await client.completions.create(
                model="tiny",
                prompt="word " * (20 * number + 1),
                max_tokens=400,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            seen = 0
            async for _ in stream:
                seen += 1
                if seen > number % 5:
                    break
            await stream.close()
            return seen

        async def vanish(number: int) -> None:
            """Leaves before anything has come: its prompt is queued, computing, or on its way."""
            ask = client.completions.create(
                model="tiny", prompt="long " * 150, max_tokens=300, extra_body={"ignore_eos": True}
            )
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02 * (number + 1)):
                    await ask

        await asyncio.gather(*(hang_up(number) for number in range(10)), *(vanish(number) for number in range(10)))
    await asyncio.to_thread(stack.assert_nothing_leaks)
    reply = await asyncio.to_thread(ask_once, stack)
    assert reply.choices[0].text


def ask_once(stack: Stack) -> openai.types.Completion:
    with openai.OpenAI(base_url=stack.base_url, api_key="none") as client:
        return client.completions.create(model="tiny", prompt="And now?", max_tokens=4, temperature=0)


async def test_a_client_that_reads_too_slowly_never_stalls_the_others(stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(stack.root_url.rsplit(":", 1)[1]))
    body = b'{"model":"tiny","prompt":"slow","max_tokens":900,"stream":true,"ignore_eos":true,"n":8,"logprobs":5}'
    head = f"POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {len(body)}\n\n"
    writer.write(head.replace("\n", "\r\n").encode() + body)
    await writer.drain()
    await reader.readline()  # the head has come: the answer is under way, and from here on nobody reads
    async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none", max_retries=0) as client:
        replies = await asyncio.gather(
            *(client.completions.create(model="tiny", prompt=f"{number}", max_tokens=20) for number in range(8))
        )
    assert len(replies) == 8
    writer.close()
    await writer.wait_closed()
    await asyncio.to_thread(stack.assert_nothing_leaks)
