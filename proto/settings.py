"""Every setting of every component: one field = one flag = one environment variable = one YAML key.

Field ``max_model_len`` is ``--max-model-len`` (or ``--max_model_len``), ``TANDEM_MAX_MODEL_LEN`` and
``max_model_len:``. Names and meanings are vLLM's where vLLM has them. Values are frozen; what is measured from the
machine (number of blocks, say) is not a setting. Reading flags, environment and files is ``tandem.options``' work.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    env: tuple[str, ...] = (),
    kind: str = "",
    short: str | None = None,
    secret: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A settings field. ``kind`` names how text is read where the type alone does not say: ``size`` (bytes: 4GiB),
    ``count`` (32K), ``length`` (32K; auto is -1), ``json``. ``env`` adds names read besides TANDEM_<FIELD>, which wins.
    ``short`` is another flag. ``secret`` is never printed. ``low`` and ``high`` bound a number, both included."""
    metadata = {
        "help": help,
        "choices": choices,
        "metavar": metavar,
        "env": env,
        "kind": kind,
        "short": short,
        "secret": secret,
        "low": low,
        "high": high,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which model, and how it is loaded."""

    model: str | None = setting(None, "local folder or hub name of a Hugging Face checkpoint")
    tokenizer: str | None = setting(None, "folder or hub name of the tokenizer, if it is not the model's")
    revision: str | None = setting(None, "branch, tag or commit on the hub")
    download_dir: str | None = setting(None, "where hub files are kept (default: HF_HOME's cache)")
    hf_token: str | None = setting(
        None, "hub token; better given by environment", env=("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), secret=True
    )
    load_format: str = setting(
        "auto",
        "dummy: random weights, no files read; bitsandbytes: as --quantization bitsandbytes",
        choices=("auto", "safetensors", "dummy", "bitsandbytes"),
    )
    quantization: str | None = setting(
        None,
        "round plain weights at load to fp8, int8 or nf4 (bitsandbytes: nf4); a quantised checkpoint needs no flag, "
        "and contradicts any but its own",
        choices=(
            *("none", "fp8", "int8", "nf4", "bitsandbytes"),
            *("awq", "awq_marlin", "gptq", "gptq_marlin", "compressed-tensors"),
        ),
        short="-q",
    )
    dtype: str = setting(
        "auto",
        "type of weights and activations; auto: the checkpoint's",
        choices=("auto", "float32", "float", "float16", "half", "bfloat16"),
    )
    max_model_len: int | None = setting(
        None, "longest prompt plus output, in tokens (32K works; -1 or auto: what fits)", kind="length", low=-1
    )
    served_model_name: tuple[str, ...] = setting((), "names clients may use; the first is shown", metavar="NAME")
    seed: int | None = setting(
        None,
        "what requests without a seed draw theirs from, in their order (default: chance, in `LLM` 0); and the seed of "
        "dummy weights (default: 0), equal on every worker",
    )
    generation_config: str = setting("auto", "auto: the model's sampling defaults; vllm: none; else a folder")
    override_generation_config: dict[str, Any] | None = setting(  # noqa: RUF009 - a field, as all of these are
        None, "JSON that overrides them", kind="json"
    )
    device: str = setting("auto", "where the model runs", choices=("auto", "cpu", "cuda"))
    threads: int | None = setting(
        None,
        "CPU threads of one engine (default: `serve` shares the cores among its workers; elsewhere OMP_NUM_THREADS, "
        "else as many as torch takes, at most the cores)",
        low=1,
    )
    batch_invariant: bool = setting(
        False, "a token's result has the same bits in any batch, chunk and equal worker (slower; no float16 on a CPU)"
    )
    attention_backend: str = setting(
        "auto", "attention's kernels; auto: triton on a GPU", choices=("auto", "triton", "torch")
    )
    enforce_eager: bool = setting(False, "capture no CUDA graphs: decode steps start their kernels one by one")
    cuda_graph_sizes: tuple[str, ...] = setting(
        (), "batch sizes of captured decode steps, e.g. 1,2,4,8 (default: 1, 2, 4, 8, 16, 24 and so on)", metavar="N"
    )
    skip_warmup: bool = setting(False, "do not run a forward pass before taking requests")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """The KV memory."""

    block_size: int = setting(16, "tokens per KV block", low=1)
    gpu_memory_utilization: float = setting(0.92, "share of the device's memory this engine may use", low=0.01, high=1)
    kv_cache_memory_bytes: int | None = setting(
        None, "size of the KV memory (4GiB works); overrides the share", kind="size", low=1
    )
    num_gpu_blocks_override: int | None = setting(None, "number of KV blocks; overrides both", low=1)
    kv_cache_dtype: str = setting(
        "auto",
        "type of keys and values; auto: the model's; fp8: half of bfloat16's room, a scale for each token and head",
        choices=("auto", "fp8", "fp8_e4m3"),
    )
    enable_prefix_caching: bool = setting(True, "reuse the blocks of equal prefixes")
    prefix_hash_key: str = setting("", "secret mixed into block hashes; equal on every worker", secret=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """What one step may hold, and how many may wait."""

    max_num_seqs: int | None = setting(None, "sequences in one step (default: 256, on CPU 128)", low=1)
    max_num_batched_tokens: int | None = setting(
        None, "tokens in one step (default: 8192 on GPU, 2048 on CPU)", kind="count", low=1
    )
    enable_chunked_prefill: bool = setting(True, "compute long prompts in chunks, between decode steps")
    long_prefill_token_threshold: int = setting(0, "largest chunk of one prompt; 0: the step's whole budget", low=0)
    async_scheduling: bool = setting(True, "on a GPU, schedule the next decode step while this one runs")
    scheduling_policy: str = setting(
        "priority",
        "order of requests; priority: the lowest first, equal ones as they come; fcfs: all as they come, and 400 where "
        "one has a priority; the same on every worker",
        choices=("fcfs", "priority"),
    )
    max_num_queued_reqs: int = setting(512, "requests that may wait on one worker; beyond it: 429", low=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSettings:
    """Where the tiers meet."""

    redis: str | None = setting(
        None, "redis://host:port/db (default for `serve`: a private one)", metavar="URL", env=("REDIS_URL",)
    )
    namespace: str = setting("tandem", "prefix of every Redis key; one per deployment")
    heartbeat_s: float = setting(1.0, "seconds between a worker's heartbeats", low=0.01)
    heartbeat_ttl_s: float = setting(5.0, "a worker is gone from the ledger after this long without one", low=0.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcSettings:
    """Encryption between the tiers. Every process of a deployment has it, or none."""

    rpc_tls_cert: str | None = setting(
        None, "this process's certificate (PEM), which the other tiers check", metavar="FILE"
    )
    rpc_tls_key: str | None = setting(None, "its key (PEM)", metavar="FILE")
    rpc_tls_ca: str | None = setting(
        None, "certificate (PEM) that signs those of the other tiers; a worker takes no one without", metavar="FILE"
    )
    rpc_tls_name: str | None = setting(
        None, "name in the workers' certificates, where it is not the address they are reached by"
    )
    nccl_beside_tls: bool = setting(False, "KV may travel by nccl and nixl all the same, which do not encrypt it")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """One prefill or decode worker as a process."""

    host: str = setting("0.0.0.0", "address the worker's gRPC service listens on")
    port: int = setting(0, "its port; 0: any free one", low=0, high=65535)
    advertise: str | None = setting(
        None,
        "host or host:port others reach it by, for `serve` a host (default: this host's address, where its name gives "
        "loopback that from which it reaches Redis)",
    )
    http_port: int | None = setting(
        None, "port for /health, /ready and /metrics; 0: any free one (default: none)", low=0, high=65535
    )
    worker_id: str | None = setting(None, "stable name of this worker (default: role, host and a nonce)")
    transports: tuple[str, ...] = setting(
        ("auto",),
        "ways to move blocks, best first: shm, cuda_ipc, nccl, nixl, grpc; auto: all of them but nccl and nixl",
        metavar="NAME",
    )
    max_held: int = setting(64, "prompts that may wait, computed, for a decode worker", low=1)
    drain_timeout: float = setting(30.0, "seconds a worker may take to finish its work after SIGTERM", low=0)
    stall_timeout: float = setting(
        60.0, "a worker that has work and finished no step for so many seconds is not ready", low=0.1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """The HTTP side."""

    host: str = setting("0.0.0.0", "address to listen on")
    port: int = setting(8000, "port to listen on", low=0, high=65535)
    api_key: tuple[str, ...] = setting(
        (), "keys clients must send (repeatable; better by environment or file)", env=("VLLM_API_KEY",), secret=True
    )
    api_key_file: str | None = setting(None, "file with one key per line")
    disagg_threshold: int = setting(
        64,
        "prompts with fewer uncached tokens are prefilled on the decode worker; 0: all go to a prefill worker",
        low=0,
    )
    request_timeout: float = setting(600.0, "seconds a request may take in all", low=0.1)
    queue_timeout: float = setting(300.0, "seconds a prompt may wait on a worker before it goes to another", low=0.1)
    prefill_timeout: float = setting(180.0, "seconds without news a worker may take to compute a prompt", low=0.1)
    transfer_timeout: float = setting(60.0, "seconds a computed prompt's blocks may take to a decode worker", low=0.1)
    silence_timeout: float = setting(120.0, "seconds a decode worker may say nothing of a running request", low=0.1)
    ttft_slo: float = setting(
        0.0,
        "429 when the first token, or room for the prompt on a decode worker, would take longer than so many seconds; "
        "0: never",
        low=0,
    )
    itl_slo: float = setting(
        0.0, "429 when tokens would be further apart than so many seconds, or lack room; 0: never", low=0
    )
    lease_s: float = setting(
        30.0,
        "seconds workers keep a request's blocks and tokens without news from their router; it renews them at a third",
        low=1,
        high=600,
    )
    health_interval: float = setting(2.0, "seconds between two looks at a worker's progress", low=0.05)
    canary_interval: float = setting(
        10.0, "age in seconds at which /ready tries the KV path anew with a tiny prompt; 0: never", low=0
    )
    drain_timeout: float = setting(30.0, "seconds requests may take to finish after SIGTERM", low=0)
    max_attempts: int = setting(6, "tries of one request before it ends with an error", low=1)
    max_logprobs: int = setting(20, "largest logprobs a request may ask for", low=0)
    max_buffered_tokens: int = setting(4096, "tokens kept for a client that reads slowly, before it is cut off", low=1)
    max_inflight: int = setting(4096, "requests in the router at once; beyond it: 429", low=1)
    chat_template: str | None = setting(None, "file with a chat template, in place of the model's")
    response_role: str = setting("assistant", "role of the messages that answer")
    sse_keep_alive_interval: float = setting(
        0.0, "seconds of silence after which a stream gets a comment; 0: never", low=0
    )
    allowed_origins: tuple[str, ...] = setting((), "CORS origins", metavar="ORIGIN")
    root_path: str = setting("", "path prefix under which a proxy serves this")
    ssl_keyfile: str | None = setting(None, "TLS key")
    ssl_certfile: str | None = setting(None, "TLS certificate")
    default_chat_template_kwargs: dict[str, Any] | None = setting(  # noqa: RUF009 - a field, as all of these are
        None, "JSON: variables for the chat template, where a request does not set them", kind="json"
    )
    disable_fastapi_docs: bool = setting(False, "do not serve /docs, /redoc and /openapi.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """What is logged, and how."""

    log_level: str = setting("info", "least severe message to log", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", "one line of text or one JSON object per message", choices=("text", "json"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSettings:
    """``tandem serve``: how many workers of each kind this machine runs."""

    prefill: int = setting(1, "prefill workers to start", metavar="N", low=0)
    decode: int = setting(1, "decode workers to start", metavar="N", low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What one engine needs."""

    model: ModelSettings = ModelSettings()
    cache: CacheSettings = CacheSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
