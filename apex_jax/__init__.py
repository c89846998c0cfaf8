"""APEX-JAX: LLM inference for GPUs too small for their KV cache.

Dimension key, used as array-name suffixes and in jaxtyping annotations:

    b  rows of a batch          t  query tokens of a row     s  KV length of a row
    n  query heads              k  KV heads                  g  query heads per KV head (n / k)
    h  head_dim                 d  model width               f  feed-forward width
    v  vocabulary               l  layers                    p  pages
    z  tokens per page          m  pages per sequence        c  KV blocks of a decode batch
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apex_jax.llm import LLM as LLM
    from apex_jax.request import SamplingParams as SamplingParams

__version__ = "0.1.0"

# What users import from here; the modules are loaded when they are first asked for.
_HOMES = {"LLM": "apex_jax.llm", "SamplingParams": "apex_jax.request"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
