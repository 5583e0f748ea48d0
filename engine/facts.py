"""What is measured or read at start, and then true for the process's life. Settings are wishes; these are facts."""

from __future__ import annotations

from dataclasses import dataclass

from proto.layout import KvLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """``numerics`` names all that decides a result's last bits (kernels, instruction set, threads, dtype)."""

    layout: KvLayout
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    long_prefill_token_threshold: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    numerics: str
    device: str

    @property
    def block_size(self) -> int:
        return self.layout.block_size

    @property
    def num_kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def max_concurrency(self) -> float:
        """How many requests of full length fit at once."""
        blocks_per_request = -(-self.max_model_len // self.block_size)
        return self.num_blocks / blocks_per_request
