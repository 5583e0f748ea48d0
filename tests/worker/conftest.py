from tests.support.redis import local_redis

__all__ = ["local_redis"]
