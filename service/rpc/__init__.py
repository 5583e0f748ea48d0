"""gRPC as the tiers use it: channels and servers with one set of options, and the stream between router and worker.

Knows connections, deadlines and bytes; what the messages mean is the tiers' business.
"""

from service.rpc.client import WorkerClient, WorkerStream
from service.rpc.connection import TlsFiles, channel, serve
from service.rpc.duplex import Duplex, StreamClosed
from service.rpc.worker import RouterStream, worker_handler

__all__ = [
    "Duplex",
    "RouterStream",
    "StreamClosed",
    "TlsFiles",
    "WorkerClient",
    "WorkerStream",
    "channel",
    "serve",
    "worker_handler",
]
