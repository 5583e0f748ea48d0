from tests.support.redis import ledger, local_redis

__all__ = ["ledger", "local_redis"]
