"""How many KV blocks, and how long a context: arithmetic on bytes and tokens, shown to whoever must change it.

Knows numbers; asks no machine and holds no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proto.errors import DoesNotFit, SettingsError
from proto.layout import KvLayout
from proto.settings import CacheSettings, SchedulerSettings

GIB = 1 << 30
DEFAULT_CPU_BYTES = 4 * GIB
"""What one engine takes on CPU when nobody says how much: several workers share a laptop."""


GRAPH_BYTES = 16 << 20
"""Set aside for what CUDA itself keeps of one captured graph; assumed, as no call tells it beforehand."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a GPU: all there are, free ones, and those that this process has taken."""

    total: int
    free: int
    own: int


@dataclass(frozen=True, slots=True)
class StepLimits:
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class Room:
    """``num_blocks`` of KV memory for requests of up to ``max_model_len`` tokens; ``reason`` says why so many."""

    num_blocks: int
    max_model_len: int
    reason: str


def step_limits(settings: SchedulerSettings, device: str, max_context: int) -> StepLimits:
    """Settings with the device's defaults filled in. Raises SettingsError where they contradict each other."""
    seqs = settings.max_num_seqs or (128 if device == "cpu" else 256)
    tokens = settings.max_num_batched_tokens or max(seqs, 2048 if device == "cpu" else 8192)
    if not settings.enable_chunked_prefill:
        if settings.max_num_batched_tokens is None:
            tokens = max(tokens, max_context)
        elif tokens < max_context:
            raise SettingsError(
                f"Without chunked prefill a step must hold a whole prompt: max_num_batched_tokens ({tokens}) is below "
                f"the context of {max_context} tokens. Raise it, lower max_model_len, or enable chunked prefill.",
                param="max_num_batched_tokens",
            )
    if settings.max_num_seqs is None:
        seqs = min(seqs, tokens)
    elif tokens < seqs:
        raise SettingsError(
            f"max_num_batched_tokens ({tokens}) must be at least max_num_seqs ({seqs}): each decodes one token a step.",
            param="max_num_batched_tokens",
        )
    return StepLimits(seqs, tokens)


def graph_bytes(sizes: Sequence[int], bytes_per_row: int, layout: KvLayout, max_context: int, vocab_size: int) -> int:
    """What captured decode steps of these sizes take beside the steps' own memory: their inputs, logits and what lies
    between, once for all; and the block that padding writes to."""
    if not sizes:
        return 0
    table_row = -(-max_context // layout.block_size) * 8
    return max(sizes) * (bytes_per_row + table_row + vocab_size * 4) + len(sizes) * GRAPH_BYTES + layout.block_bytes


def wanted_length(max_model_len: int | None, max_context: int) -> int:
    """The longest context to make room for. Raises SettingsError beyond what the model is made for."""
    if max_model_len is None or max_model_len == -1:
        return max_context
    if max_model_len < 1:
        raise SettingsError(f"max_model_len must be positive, -1 or auto, got {max_model_len}.", param="max_model_len")
    if max_model_len > max_context:
        raise SettingsError(
            f"max_model_len {max_model_len} exceeds the {max_context} tokens this model is made for (config.json's "
            "max_position_embeddings, rope scaling included).",
            param="max_model_len",
        )
    return max_model_len


def check_weights(num_parameters: int, needed: int, kind: str, available: int, device: str, hint: str) -> None:
    """Raises DoesNotFit, with the arithmetic, where ``needed`` bytes of weights exceed the ``available`` ones. ``kind``
    says what the weights are, ``hint`` what would make them smaller."""
    if needed > available:
        raise DoesNotFit(
            f"The weights do not fit: {num_parameters:,} parameters x {needed / max(1, num_parameters):.3g} bytes "
            f"({kind}) = {_gib(needed)}; {_gib(available)} of memory are available on {device}. Free memory, take a "
            f"smaller model{hint}."
        )


def make_room(
    layout: KvLayout,
    cache: CacheSettings,
    limits: StepLimits,
    *,
    max_model_len: int | None,
    max_context: int,
    available: int,
    device: str,
) -> Room:
    """Decides the size of the KV memory and the context it can serve.

    ``available``: bytes free after the weights are loaded and, on a GPU, after what a step needs. Raises DoesNotFit
    when not one block fits, or not one request of an explicit ``max_model_len``.
    """
    length = wanted_length(max_model_len, max_context)
    is_explicit = max_model_len is not None and max_model_len != -1
    blocks_per_request = -(-length // layout.block_size)
    num_bytes, reason = _kv_bytes(layout, cache, limits, blocks_per_request, is_explicit, available, device)
    num_blocks = cache.num_gpu_blocks_override or num_bytes // layout.block_bytes
    if num_blocks < 1:
        raise DoesNotFit(f"No KV block fits: one has {layout.block_bytes:,} bytes, there are {num_bytes:,} ({reason}).")
    if num_blocks >= blocks_per_request:
        return Room(num_blocks, length, reason)
    room = num_blocks * layout.block_size
    if is_explicit:
        raise DoesNotFit(
            f"A request of max_model_len {length} tokens needs {blocks_per_request} blocks x {layout.block_bytes:,} "
            f"bytes = {_gib(blocks_per_request * layout.block_bytes)} of KV memory; there are {num_blocks} blocks = "
            f"{_gib(num_blocks * layout.block_bytes)} ({reason}). At most {room} tokens fit: lower max_model_len, or "
            "raise kv_cache_memory_bytes or gpu_memory_utilization."
        )
    return Room(num_blocks, room, f"{reason}; max_model_len lowered from {length} to the {room} tokens that fit")


def device_room(memory: DeviceMemory, utilization: float, needed: int) -> int:
    """Bytes for KV memory on a GPU: this process's share of all there is, less what it has and what a step needs.

    Never more than is free. Other processes on the device have shares of their own, and may take them at any time.
    """
    return max(0, min(int(memory.total * utilization) - memory.own, memory.free) - needed)


def _kv_bytes(
    layout: KvLayout,
    cache: CacheSettings,
    limits: StepLimits,
    blocks_per_request: int,
    is_explicit: bool,
    available: int,
    device: str,
) -> tuple[int, str]:
    """Bytes for KV memory, and where the number comes from."""
    if cache.num_gpu_blocks_override is not None:
        blocks = cache.num_gpu_blocks_override
        return blocks * layout.block_bytes, f"num_gpu_blocks_override {blocks}"
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes, f"kv_cache_memory_bytes {_gib(cache.kv_cache_memory_bytes)}"
    share = int(available * cache.gpu_memory_utilization) if device == "cpu" else available
    reason = f"gpu_memory_utilization {cache.gpu_memory_utilization:g} leaves {_gib(share)}"
    if device != "cpu":
        return share, reason
    one = blocks_per_request * layout.block_bytes
    enough = min(limits.max_num_seqs * one, max(DEFAULT_CPU_BYTES, one if is_explicit else 0))
    if share <= enough:
        return share, reason
    return enough, f"CPU default, {_gib(enough)} of {_gib(available)} available; kv_cache_memory_bytes sets another"


def _gib(num_bytes: int) -> str:
    if num_bytes < GIB // 10:
        return f"{num_bytes / (1 << 20):.1f} MiB"
    return f"{num_bytes / GIB:.2f} GiB"
