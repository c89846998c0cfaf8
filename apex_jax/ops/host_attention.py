"""Paged decode attention on the host CPU, over a KV pool in its memory.

One pool holds one layer's pages, `[p, k, 2, z, h]`: keys and values of a KV head side by side. How
elements lie inside a page is the native code's business (cpu_ops/layout.h); read_pages and
write_pages translate. Functions that write take the pool first, donate it and return it: keep the
returned one. Call native_library.load() before any of them. Shapes and dtypes are checked when a
call is traced, values (page ids, lengths) when it runs. A lone call finds them wrong before it
gives the pool away; inside a larger program, or compiled ahead of time, the pool is lost by then.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int32

from apex_jax.ops import native_library

DTYPES = ("float32", "float16", "bfloat16")


def allocate_pool(
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: np.typing.DTypeLike,
    device: jax.Device | None = None,
) -> Float[Array, "p k 2 z h"]:
    """Return a zeroed pool for one layer on a CPU, in huge pages where the system has them.

    page_size and head_dim are multiples of 8; 16 divides the page_size of a fast pool. device: one
    of jax.devices("cpu"), None for the first.
    """
    native_library.require_loaded()
    dtype = np.dtype(dtype)
    sizes = {"num_pages": num_pages, "num_kv_heads": num_kv_heads}
    for name, size in {**sizes, "page_size": page_size, "head_dim": head_dim}.items():
        if size < 1:
            raise ValueError(f"{name} = {size}: must be at least 1")
    for name, size in {"page_size": page_size, "head_dim": head_dim}.items():
        if size % 8:
            raise ValueError(f"{name} = {size}: must be a multiple of 8")
    if dtype.name not in DTYPES:
        raise TypeError(f"dtype = {dtype}: must be one of {', '.join(DTYPES)}")
    with jax.default_device(device or jax.devices("cpu")[0]):
        return _allocate((num_pages, num_kv_heads, 2, page_size, head_dim), dtype)


def append(
    pool: Float[Array, "p k 2 z h"],
    k_bkh: Float[Array, "b k h"],
    v_bkh: Float[Array, "b k h"],
    block_tables_bm: Int32[Array, "b m"],
    lengths_b: Int32[Array, "b"],
    num_rows: Int32[Array, ""] | None = None,
) -> Float[Array, "p k 2 z h"]:
    """Write one token's keys and values per row at index lengths_b - 1; donates the pool.

    Converts to the pool's dtype. num_rows: how many rows count, None for all; the others are
    padding. Raises for two rows that would write to one slot.
    """
    _check_pool(pool)
    _check_tables(block_tables_bm, lengths_b)
    rows, (kv_heads, head_dim) = block_tables_bm.shape[0], (pool.shape[1], pool.shape[4])
    for name, array in {"k_bkh": k_bkh, "v_bkh": v_bkh}.items():
        _check_float(name, array)
        _check_shape(name, array, (rows, kv_heads, head_dim))
    if k_bkh.dtype != v_bkh.dtype:
        raise TypeError(f"v_bkh: dtype {v_bkh.dtype}, but k_bkh has {k_bkh.dtype}")
    num_rows = _count("num_rows", num_rows, rows)
    _check_append_values(pool, block_tables_bm, lengths_b, num_rows)
    return _append(pool, k_bkh, v_bkh, block_tables_bm, lengths_b, num_rows)


def attend(
    pool: Float[Array, "p k 2 z h"],
    q_bnh: Float[Array, "b n h"],
    block_tables_bm: Int32[Array, "b m"],
    lengths_b: Int32[Array, "b"],
    scale: float | None = None,
) -> tuple[Float[Array, "b n h"], Float[Array, "b n"]]:
    """Return softmax(scale * q k^T) v of each row over its lengths_b tokens, and the log-sum-exp.

    The output has the dtype of the queries; the log-sum-exp is float32. scale: None for h ** -0.5.
    A row's result is the same to the bit whatever the other rows and the number of threads.
    """
    _check_pool(pool)
    _check_tables(block_tables_bm, lengths_b)
    _check_float("q_bnh", q_bnh)
    rows, (kv_heads, head_dim) = block_tables_bm.shape[0], (pool.shape[1], pool.shape[4])
    _check_shape("q_bnh", q_bnh, (rows, None, head_dim))
    num_heads = q_bnh.shape[1]
    if num_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"q_bnh: {num_heads} query heads: no multiple of {kv_heads} KV heads")
    return _attend(pool, q_bnh, block_tables_bm, lengths_b, _scale(scale, head_dim))


def append_and_attend(
    pool: Float[Array, "p k 2 z h"],
    qkv_bjh: Float[Array, "b j h"],
    block_tables_bm: Int32[Array, "b m"],
    lengths_b: Int32[Array, "b"],
    num_rows: Int32[Array, ""] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "p k 2 z h"], Float[Array, "b n h"], Float[Array, "b n"]]:
    """Append each row's key and value, then attend, itself included; donates the pool.

    qkv_bjh: n query heads, then k key heads, then k value heads (j = n + 2k), so that what crosses
    from the device is one array. num_rows: how many rows count, None for all; the others are
    padding, neither read nor written, and their results are zero. Returns the pool, the output
    and the log-sum-exp.
    """
    _check_pool(pool)
    _check_tables(block_tables_bm, lengths_b)
    _check_float("qkv_bjh", qkv_bjh)
    rows, (kv_heads, head_dim) = block_tables_bm.shape[0], (pool.shape[1], pool.shape[4])
    _check_shape("qkv_bjh", qkv_bjh, (rows, None, head_dim))
    num_rows = _count("num_rows", num_rows, rows)
    num_heads = qkv_bjh.shape[1] - 2 * kv_heads
    if num_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"qkv_bjh: {qkv_bjh.shape[1]} heads leave {num_heads} query heads: "
            f"no multiple of {kv_heads} KV heads"
        )
    _check_append_values(pool, block_tables_bm, lengths_b, num_rows)
    scale = _scale(scale, head_dim)
    return _append_and_attend(pool, qkv_bjh, block_tables_bm, lengths_b, num_rows, scale)


def write_pages(
    pool: Float[Array, "p k 2 z h"],
    pages_ik2zh: Float[Array, "i k 2 z h"],
    page_ids_i: Int32[Array, "i"],
    num_pages: Int32[Array, ""] | None = None,
) -> Float[Array, "p k 2 z h"]:
    """Write whole pages, tokens in order, keys before values; donates the pool.

    Converts to the pool's dtype. num_pages: how many count, None for all; the others are padding.
    Raises for a page that is named twice.
    """
    _check_pool(pool)
    _check_float("pages_ik2zh", pages_ik2zh)
    _check_int32("page_ids_i", page_ids_i, 1)
    _check_shape("pages_ik2zh", pages_ik2zh, (page_ids_i.shape[0], *pool.shape[1:]))
    num_pages = _count("num_pages", num_pages, page_ids_i.shape[0])
    if not _is_traced(pool, page_ids_i, num_pages):
        ids = np.asarray(page_ids_i)[: int(num_pages)]
        native_library.check_written_pages(pool.shape[0], ids)
    return _write_pages(pool, pages_ik2zh, page_ids_i, num_pages)


def read_pages(
    pool: Float[Array, "p k 2 z h"],
    page_ids_i: Int32[Array, "i"],
    num_pages: Int32[Array, ""] | None = None,
) -> Float[Array, "i k 2 z h"]:
    """Return whole pages as write_pages takes them, in the pool's dtype.

    num_pages: how many count, None for all; the others are padding, and come back zero.
    """
    _check_pool(pool)
    _check_int32("page_ids_i", page_ids_i, 1)
    num_pages = _count("num_pages", num_pages, page_ids_i.shape[0])
    return _read_pages(pool, page_ids_i, num_pages)


def _check_pool(pool: Array) -> None:
    native_library.require_loaded()
    if not isinstance(pool, Tracer) and pool.is_deleted():
        raise ValueError("pool: it was released (donated to an earlier call, or deleted)")
    _check_float("pool", pool)
    _check_shape("pool", pool, (None, None, 2, None, None))


def _check_tables(block_tables_bm: Array, lengths_b: Array) -> None:
    _check_int32("block_tables_bm", block_tables_bm, 2)
    _check_int32("lengths_b", lengths_b, 1)
    _check_shape("lengths_b", lengths_b, block_tables_bm.shape[:1])


def _check_append_values(
    pool: Array, block_tables_bm: Array, lengths_b: Array, num_rows: Array
) -> None:
    """Raise what the call would raise, while the pool is still the caller's."""
    if not _is_traced(pool, block_tables_bm, lengths_b, num_rows):
        values = (np.asarray(one)[: int(num_rows)] for one in (block_tables_bm, lengths_b))
        native_library.check_append(pool.shape[0], pool.shape[3], *values)


def _is_traced(*arrays: Array) -> bool:
    return any(isinstance(array, Tracer) for array in arrays)


def _check_float(name: str, array: Array) -> None:
    if array.dtype.name not in DTYPES:
        raise TypeError(f"{name}: dtype {array.dtype}: must be one of {', '.join(DTYPES)}")


def _check_int32(name: str, array: Array, rank: int) -> None:
    if array.dtype != jnp.int32:
        raise TypeError(f"{name}: dtype {array.dtype}: must be int32")
    _check_shape(name, array, (None,) * rank)


def _check_shape(name: str, array: Array, wanted: tuple[int | None, ...]) -> None:
    """Raise ValueError unless the array has the wanted sizes; None stands for any."""
    fits = len(array.shape) == len(wanted) and all(
        size is None or size == found for size, found in zip(wanted, array.shape, strict=True)
    )
    if not fits:
        text = ", ".join("any" if size is None else str(size) for size in wanted)
        raise ValueError(f"{name}: shape {array.shape}: must be ({text})")


def _count(name: str, count: Array | None, most: int) -> Array:
    """Return how many rows or pages of padded arrays count."""
    if count is None:
        return jnp.asarray(most, jnp.int32)
    _check_int32(name, count, 0)
    if not isinstance(count, Tracer) and not 1 <= int(count) <= most:
        raise ValueError(f"{name} = {int(count)}: must be from 1 to {most}, what the arrays hold")
    return count


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not math.isfinite(scale):
        raise ValueError(f"scale = {scale}: must be finite")
    return float(scale)


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _output_like(
    q_dtype: np.dtype, rows: int, num_heads: int, head_dim: int
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return (
        jax.ShapeDtypeStruct((rows, num_heads, head_dim), q_dtype),
        jax.ShapeDtypeStruct((rows, num_heads), jnp.float32),
    )


# Each is jitted: a lone call donates its pool, and a call inside a larger program is part of it.


@functools.partial(jax.jit, static_argnums=(0, 1))
def _allocate(shape, dtype):
    return jax.ffi.ffi_call("apex_allocate", jax.ShapeDtypeStruct(shape, dtype))()


@functools.partial(jax.jit, donate_argnums=0)
def _append(pool, k_bkh, v_bkh, block_tables_bm, lengths_b, num_rows):
    call = jax.ffi.ffi_call("apex_append", _like(pool), input_output_aliases={0: 0})
    return call(pool, k_bkh, v_bkh, block_tables_bm, lengths_b, num_rows)


@functools.partial(jax.jit, static_argnums=4)
def _attend(pool, q_bnh, block_tables_bm, lengths_b, scale):
    call = jax.ffi.ffi_call("apex_attend", _output_like(q_bnh.dtype, *q_bnh.shape))
    return call(pool, q_bnh, block_tables_bm, lengths_b, scale=np.float32(scale))


@functools.partial(jax.jit, static_argnums=5, donate_argnums=0)
def _append_and_attend(pool, qkv_bjh, block_tables_bm, lengths_b, num_rows, scale):
    rows, num_rows_heads, head_dim = qkv_bjh.shape
    num_heads = num_rows_heads - 2 * pool.shape[1]
    results = (_like(pool), *_output_like(qkv_bjh.dtype, rows, num_heads, head_dim))
    call = jax.ffi.ffi_call("apex_append_and_attend", results, input_output_aliases={0: 0})
    operands = (pool, qkv_bjh, block_tables_bm, lengths_b, num_rows)
    return call(*operands, scale=np.float32(scale))


@functools.partial(jax.jit, donate_argnums=0)
def _write_pages(pool, pages_ik2zh, page_ids_i, num_pages):
    call = jax.ffi.ffi_call("apex_write_pages", _like(pool), input_output_aliases={0: 0})
    return call(pool, pages_ik2zh, page_ids_i, num_pages)


@jax.jit
def _read_pages(pool, page_ids_i, num_pages):
    like = jax.ShapeDtypeStruct((*page_ids_i.shape, *pool.shape[1:]), pool.dtype)
    return jax.ffi.ffi_call("apex_read_pages", like)(pool, page_ids_i, num_pages)
