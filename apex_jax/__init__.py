"""APEX-JAX: LLM inference for GPUs too small for their KV cache.

Dimension key, used as array-name suffixes and in jaxtyping annotations:

    b  rows of a batch          t  query tokens of a row     s  KV length of a row
    n  query heads              k  KV heads                  g  query heads per KV head (n / k)
    h  head_dim                 d  model width               f  feed-forward width
    v  vocabulary               l  layers                    p  pages
    z  tokens per page          m  pages per sequence        c  KV blocks of a decode batch
"""

__version__ = "0.1.0"
