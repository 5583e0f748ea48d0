"""The whole stack on one device: a prefill and a decode worker against one process that does both in turns."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from bench.gpu.children import environment
from bench.gpu.engines import described
from bench.gpu.figures import Entry, Figure, Missing
from bench.gpu.lab import Lab
from bench.settings import Load, RandomData, Sampling, Saving, ServeSettings, Target, TokenChoice, Wanted
from router.values import Json, JsonObject

_NEEDED = ("fastapi", "pydantic", "starlette", "redis", "uvicorn", "aiohttp")
_START_S = 240.0
_STOP_S = 60.0
_MEMORY_S = 20.0
_STDERR = 2
_WORKERS = {"1P1D": ("--prefill=1", "--decode=1"), "one process": ("--prefill=0", "--decode=1")}
_MEMORY = "--gpu-memory-utilization=0.88"
"""Of the device, for all workers together."""
_METRICS = ("ttft", "itl", "tpot")


def measure(lab: Lab) -> Iterator[Entry]:
    lacking = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        yield Missing("all", f"not installed here: {', '.join(lacking)}")
        return
    results: dict[tuple[str, float], Mapping[str, Json]] = {}
    for name, workers in _WORKERS.items():
        with _stack(lab, *workers, _MEMORY) as port:
            for rate in lab.sizes.load.rates:
                results[name, rate] = _offer(lab, port, rate)
    load = lab.sizes.load
    for rate in load.rates:
        ours, other = (results[name, rate] for name in _WORKERS)
        what = f"{load.input_len} in, {load.output_len} out, {rate:g}/s"
        for key, unit in (
            ("p50_ttft_ms", "ms"),
            ("p99_ttft_ms", "ms"),
            ("p50_itl_ms", "ms"),
            ("p99_itl_ms", "ms"),
            ("request_goodput", "good requests/s"),
        ):
            value, theirs = (_number(result, key) for result in (ours, other))
            case = f"{what}: {key.removesuffix('_ms').replace('_', ' ')}"
            yield Figure(case, value, unit, value / theirs if theirs else None, f"{theirs:,.4g} in one process")
        failed = sum(_number(result, "failed") for result in (ours, other))
        yield Figure(f"{what}: failed requests", failed, "")


def _number(result: Mapping[str, Json], key: str) -> float:
    value = result.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


@contextmanager
def _stack(lab: Lab, *flags: str) -> Iterator[int]:
    """A stack of the measured model, ready for requests at the port that is given."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    load = lab.sizes.load
    free_before = _free_memory(lab)
    wish = (
        *(str(described(lab)), "--load-format=dummy", "--host=127.0.0.1", f"--port={port}"),
        *(f"--max-model-len={load.input_len + load.output_len + 64}", "--disagg-threshold=0", "--log-level=warning"),
        *(() if lab.is_gpu else ("--num-gpu-blocks-override=64", "--attention-backend=torch")),
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "tandem", "serve", *wish, *flags],
        env=environment(),
        stdout=_STDERR,
    )
    try:
        _wait(process, port)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _wait_for_memory(lab, free_before)


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    """Until it answers that it is ready. Raises RuntimeError where it does not come to that."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the stack ended with status {process.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", "/ready")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.5)
    raise RuntimeError(f"the stack was not ready within {_START_S:.0f} s")


def _free_memory(lab: Lab) -> int:
    return int(torch.cuda.mem_get_info(lab.device)[0]) if lab.is_gpu else 0


def _wait_for_memory(lab: Lab, free_before: int) -> None:
    """The next stack sizes itself by what is free; a process's memory is back a moment after its end."""
    deadline = time.monotonic() + _MEMORY_S
    while _free_memory(lab) < 0.95 * free_before and time.monotonic() < deadline:
        time.sleep(0.2)


def _offer(lab: Lab, port: int, rate: float) -> JsonObject:
    from bench.serve import serve  # needs what a machine that only computes has not

    load, file = lab.sizes.load, f"{port}-{rate}.json"
    wish = ServeSettings(
        target=Target(f"http://127.0.0.1:{port}"),
        dataset=RandomData(load.input_len, load.output_len),
        tokens=TokenChoice(vocab_size=lab.sizes.vocab_size),
        load=Load(num_prompts=load.num_prompts, request_rate=rate, num_warmups=2, seed=int(rate * 100)),
        sampling=Sampling(ignore_eos=True),
        wanted=Wanted(_METRICS, (50.0, 99.0), {"ttft": load.max_ttft_ms, "tpot": load.max_tpot_ms}),
        saving=Saving(lab.scratch, file),
    )
    asyncio.run(serve(wish, lambda text: None, lambda text: print(text, file=sys.stderr)))
    result: JsonObject = json.loads((lab.scratch / file).read_text())
    return result
