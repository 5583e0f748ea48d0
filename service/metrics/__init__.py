"""Prometheus metrics of a router and of a worker, by typed methods; names, labels and buckets stay in here.

Names that vLLM has are kept, with its labels, so that its dashboards and autoscalers work unchanged. What only a split
system has is named ``tandem_*``. Request-level families are the router's, engine-level ones the workers'; the three
load gauges exist on both, where the router's are sums (or means) over its workers.
"""

from service.metrics.ledger import show_ledger, show_publisher
from service.metrics.router import RequestSummary, RouterMetrics
from service.metrics.worker import EngineTotals, WorkerMetrics

__all__ = ["EngineTotals", "RequestSummary", "RouterMetrics", "WorkerMetrics", "show_ledger", "show_publisher"]
