"""What a token may look at: strategies (statements of visibility), plans, backends and the key-value cache."""

from mvar_lightning.attention.backends import AttentionBackend, choose_backend
from mvar_lightning.attention.cache_policy import CachePolicy, KeepAll, ScaleKV
from mvar_lightning.attention.kv_cache import KVCache, LayerCache, TakesKeys
from mvar_lightning.attention.plan import AttentionPlan, ScaleRead
from mvar_lightning.attention.strategies import (
    AdjacentAttention,
    AttentionStrategy,
    FullAttention,
    SlidingWindowAttention,
    SpatialAttention,
)

__all__ = [
    "AdjacentAttention",
    "AttentionBackend",
    "AttentionPlan",
    "AttentionStrategy",
    "CachePolicy",
    "FullAttention",
    "KVCache",
    "KeepAll",
    "LayerCache",
    "ScaleKV",
    "ScaleRead",
    "SlidingWindowAttention",
    "SpatialAttention",
    "TakesKeys",
    "choose_backend",
]
