"""The memory of the key/value cache."""

from echoatt_runtime.cache.capacity import BUCKET, bucket_capacity
from echoatt_runtime.cache.kv_cache import KVCache
from echoatt_runtime.cache.memory import HostMemory, Memory

__all__ = ["BUCKET", "HostMemory", "KVCache", "Memory", "bucket_capacity"]
