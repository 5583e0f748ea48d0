"""Prometheus metrics of a router and of a worker, by typed methods; names, labels and buckets stay in here.

Names that vLLM has are kept, with its labels, so that its dashboards and autoscalers work unchanged. What only a split
system has is named ``tandem_*``. Request-level families are the router's, engine-level ones the workers'. What both
have (the three load gauges, a stage's seconds, the bytes moved) bears ``role`` on a worker's page and not on the
router's, which speaks of all workers: ``docs/metrics.md``.
"""

from service.metrics.ledger import show_ledger, show_publisher
from service.metrics.router import RequestSummary, RouterMetrics
from service.metrics.worker import EngineTotals, WorkerMetrics

__all__ = ["EngineTotals", "RequestSummary", "RouterMetrics", "WorkerMetrics", "show_ledger", "show_publisher"]
