"""Paged attention against float64, at awkward sizes and among poisoned pages."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apex_jax import packing, stages
from apex_jax.attention import append_kv, decode_attention
from apex_jax.buckets import PAGES_PER_BLOCK
from apex_jax.config import LlamaConfig
from apex_jax.kv_cache import NativePages, XlaPages
from apex_jax.models import weights
from apex_jax.ops import host_attention, native_library
from apex_jax.packing import PrefillArrays, pack_blocks, pack_prefill, pack_rows
from apex_jax.plan import DecodeBatch, PrefillBatch

# Error over the largest value that the row attends to, in ulps (eps) of the KV dtype. Half
# precision: the weights are rounded before they meet the values, and the result at the end, half an
# ulp each. float32: the sums of up to a thousand terms, and the scores' error inside exp.
MAX_ULPS = {"float32": 16.0, "bfloat16": 1.25, "float16": 1.25}
POISONS = (np.nan, np.inf, -np.inf)

append = jax.jit(append_kv)
decode = jax.jit(decode_attention)
decode_stage = jax.jit(lambda pages, *arguments: pages.decode(*arguments), donate_argnums=0)
prefill_stage = jax.jit(lambda pages, *arguments: pages.prefill(*arguments), donate_argnums=0)
unpack_targets = jax.jit(packing.unpack_prefill_targets, static_argnums=(1, 2))


@pytest.fixture(autouse=True, scope="module")
def _op():
    native_library.load(num_threads=2)


class Pool:
    """Keys and values of one layer. Whatever no sequence wrote is NaN or infinite."""

    def __init__(self, rng, *, num_pages, k_heads, page_size, head_dim, dtype, is_native=False):
        self.rng, self.page_size, self.is_native = rng, page_size, is_native
        shape = (num_pages, k_heads, page_size, head_dim)
        self.k = jnp.asarray(rng.choice(POISONS, shape), dtype)
        self.v = jnp.asarray(rng.choice(POISONS, shape), dtype)
        self.free = rng.permutation(num_pages).tolist()

    def table(self, lengths, shared_pages=0):
        """Return a block table of scattered pages; the second row shares its first with the first.

        Entries past a row's end name pages that are poisoned throughout.
        """
        pages = [-(-length // self.page_size) for length in lengths]
        poisoned = self.free.pop()
        table_bm = np.full((len(lengths), max(pages)), poisoned, np.int32)
        for row, count in enumerate(pages):
            table_bm[row, :count] = [self.free.pop() for _ in range(count)]
        if shared_pages:
            table_bm[1, :shared_pages] = table_bm[0, :shared_pages]
        return table_bm

    def fill(self, table_bm, lengths):
        """Write random keys and values of each row's first `lengths` tokens."""
        k, v = np.array(self.k), np.array(self.v)
        for row, length in enumerate(lengths):
            for page in range(-(-length // self.page_size)):
                used = min(self.page_size, length - page * self.page_size)
                for pool in (k, v):
                    block = pool[table_bm[row, page], :, :used]
                    block[...] = self.rng.normal(size=block.shape)
        self.k, self.v = jnp.asarray(k), jnp.asarray(v)

    def run(self, stage, *arguments):
        """Call a stage that writes to the pages; return what it attended."""
        ids = jnp.arange(self.k.shape[0], dtype=jnp.int32)
        if not self.is_native:
            attended, (self.k, self.v) = stage(XlaPages(self.k, self.v), *arguments)
            return attended
        num_pages, k_heads, z, h = self.k.shape
        pool = host_attention.allocate_pool(num_pages, k_heads, z, h, self.k.dtype)
        pool = host_attention.write_pages(pool, jnp.stack([self.k, self.v], axis=2), ids)
        attended, (pool,) = stage(NativePages(pool), *arguments)
        self.k, self.v = jnp.moveaxis(host_attention.read_pages(pool, ids), 2, 0)
        return attended

    def sequence(self, table_m, length):
        """Return keys and values [length, k, h] of one sequence in float64."""
        index = np.arange(length)
        pages, slots = table_m[index // self.page_size], index % self.page_size
        return tuple(
            np.asarray(pool)[pages, :, slots].astype(np.float64) for pool in (self.k, self.v)
        )


def reference(q_nh, k_skh, v_skh):
    """Softmax attention of one query in float64; the plain twin of both kernels."""
    n, h = q_nh.shape
    heads_k = k_skh.shape[1]
    q_kgh = q_nh.astype(np.float64).reshape(heads_k, n // heads_k, h)
    scores_kgs = np.einsum("kgh,skh->kgs", q_kgh, k_skh) * h**-0.5
    weights_kgs = np.exp(scores_kgs - scores_kgs.max(-1, keepdims=True))
    weights_kgs /= weights_kgs.sum(-1, keepdims=True)
    return np.einsum("kgs,skh->kgh", weights_kgs, v_skh).reshape(n, h)


def ulps(actual, expected, v_skh, dtype):
    error = np.abs(actual.astype(np.float64) - expected).max()
    return error / (np.abs(v_skh).max() * float(jnp.finfo(dtype).eps))


def random(rng, shape, dtype, scale=1.0):
    return (rng.normal(size=shape) * scale).astype(jnp.dtype(dtype))


def decode_rows(pool, rng, positions, table_bm, *, n, rows, blocks, dtype, q_scale=1.0):
    """Append a token to each row as the plan's batch says, then attend; return q and the output."""
    b, z = len(positions), pool.page_size
    batch = DecodeBatch(np.arange(b, dtype=np.int32), np.array(positions, np.int32), table_bm)
    rows_b4 = pack_rows(batch, rows=rows, page_size=z)
    blocks_ci = pack_blocks(batch, rows=rows, blocks=blocks, page_size=z)
    k_heads, h = pool.k.shape[1], pool.k.shape[3]
    # Padding rows bring values of their own, which must reach nobody.
    new = [random(rng, (rows, k_heads, h), dtype) for _ in range(2)]
    for padded in new:
        padded[b:] = np.nan
    q_bnh = random(rng, (rows, n, h), dtype, q_scale)
    qkv_bjh = np.concatenate([q_bnh, *new], axis=1)
    out_bnh = pool.run(decode_stage, qkv_bjh, rows_b4, blocks_ci)
    assert out_bnh.dtype == q_bnh.dtype
    for row, position in enumerate(positions):  # the token lies where its successors look for it
        for keys_or_values, written in zip(
            pool.sequence(table_bm[row], position + 1), new, strict=True
        ):
            assert np.array_equal(keys_or_values[-1], np.asarray(written[row]).astype(np.float64))
    return np.asarray(q_bnh), np.asarray(out_bnh)


POOL = {"num_pages": 64, "k_heads": 2, "page_size": 16, "head_dim": 64, "dtype": "float32"}
both_kinds = pytest.mark.parametrize("is_native", [False, True], ids=["xla", "native"])

# Query heads over KV heads: as many (MHA), a few each (GQA), one for all (MQA).
SHAPES = [
    (4, 4, 64, 16, "float32"),
    (8, 2, 128, 16, "float32"),
    (4, 1, 80, 8, "float32"),
    (4, 2, 80, 32, "bfloat16"),
    (2, 2, 128, 8, "bfloat16"),
    (8, 2, 64, 16, "float16"),
    (3, 1, 128, 32, "float16"),
]


@both_kinds
@pytest.mark.parametrize(("n", "k_heads", "h", "z", "dtype"), SHAPES)
def test_decode_is_softmax_attention(n, k_heads, h, z, dtype, is_native):
    rng = np.random.default_rng(n * h + z)
    block = z * PAGES_PER_BLOCK
    # KV lengths after the new token: one, around a page, around a block, around two.
    lengths = [1, z - 1, z, z + 1, block - 1, block, block + 1, 2 * block, 2 * block + z + 1, 3]
    shape = {"num_pages": 96, "k_heads": k_heads, "page_size": z, "head_dim": h}
    pool = Pool(rng, **shape, dtype=dtype, is_native=is_native)
    table_bm = pool.table(lengths)
    pool.fill(table_bm, [length - 1 for length in lengths])
    positions = [length - 1 for length in lengths]
    q, out = decode_rows(pool, rng, positions, table_bm, n=n, rows=16, blocks=20, dtype=dtype)
    for row, length in enumerate(lengths):
        k_skh, v_skh = pool.sequence(table_bm[row], length)
        expected = reference(q[row], k_skh, v_skh)
        assert ulps(out[row], expected, v_skh, dtype) < MAX_ULPS[dtype], length
    assert (out[len(lengths) :] == 0).all()  # padding rows


@both_kinds
def test_decode_of_a_batch_without_padding(is_native):
    rng = np.random.default_rng(1)
    lengths = [33, 128, 129, 200]
    pool = Pool(rng, **POOL, is_native=is_native)
    table_bm = pool.table(lengths)
    positions = [length - 1 for length in lengths]
    pool.fill(table_bm, positions)
    q, out = decode_rows(pool, rng, positions, table_bm, n=4, rows=4, blocks=6, dtype="float32")
    for row, length in enumerate(lengths):
        k_skh, v_skh = pool.sequence(table_bm[row], length)
        assert ulps(out[row], reference(q[row], k_skh, v_skh), v_skh, "float32") < 16


@both_kinds
def test_decode_of_sharp_scores_in_shared_pages(is_native):
    """Scores of hundreds: exp must not overflow, and a block's own maximum must not rule."""
    rng = np.random.default_rng(2)
    lengths = [150, 290, 40]
    pool = Pool(rng, **POOL, is_native=is_native)
    table_bm = pool.table(lengths, shared_pages=9)
    positions = [length - 1 for length in lengths]
    pool.fill(table_bm, positions)
    q, out = decode_rows(
        pool, rng, positions, table_bm, n=4, rows=4, blocks=8, dtype="float32", q_scale=60.0
    )
    for row, length in enumerate(lengths):
        k_skh, v_skh = pool.sequence(table_bm[row], length)
        # A score of 200 is known to 1e-5, and so is its weight.
        assert ulps(out[row], reference(q[row], k_skh, v_skh), v_skh, "float32") < 1000


def test_decode_does_not_depend_on_the_padding():
    rng = np.random.default_rng(3)
    lengths = [1, 130, 64]
    pool = Pool(rng, **POOL)
    table_bm = pool.table(lengths)
    pool.fill(table_bm, lengths)
    batch = DecodeBatch(np.arange(3, dtype=np.int32), np.array(lengths, np.int32) - 1, table_bm)
    q_bnh = random(rng, (8, 4, 64), "float32")
    outs = []
    for rows, blocks in ((4, 4), (8, 9)):
        blocks_ci = pack_blocks(batch, rows=rows, blocks=blocks, page_size=16)
        arguments = (blocks_ci[:, 2:], blocks_ci[:, 0], blocks_ci[:, 1])
        outs.append(np.asarray(decode(q_bnh[:rows], pool.k, pool.v, *arguments))[:3])
    np.testing.assert_allclose(*outs, rtol=0, atol=4e-6)


def prefill_chunk(pool, starts, lengths, table_bm, kv, q_btnh, *, rows, context_pages):
    """Append a chunk as the plan's batch says, then attend; kv and q are already padded."""
    b, t = len(starts), q_btnh.shape[1]
    batch = PrefillBatch(
        np.zeros((b, t), np.int32),
        np.array(starts, np.int32),
        np.array(lengths, np.int32),
        table_bm,
    )
    packed = pack_prefill(batch, rows=rows, context_pages=context_pages)
    arrays = PrefillArrays(*map(jnp.asarray, packed))
    _, pages_bt, slots_bt = unpack_targets(arrays, pool.k.shape[0], pool.page_size)
    out = pool.run(prefill_stage, q_btnh, *kv, pages_bt, slots_bt, packed[1])
    assert out.dtype == q_btnh.dtype
    return np.asarray(out)


# The context in pages is a bucket: shorter than a step of the scan, a step, several, and uneven.
PREFILL_SHAPES = [
    (4, 4, 64, 16, 8, "float32"),
    (8, 2, 128, 8, 40, "float32"),
    (4, 1, 80, 16, 16, "float32"),
    (4, 2, 80, 8, 24, "bfloat16"),
    (4, 2, 64, 32, 8, "float16"),
]


@both_kinds
@pytest.mark.parametrize(("n", "k_heads", "h", "z", "context_pages", "dtype"), PREFILL_SHAPES)
def test_prefill_is_causal_attention(n, k_heads, h, z, context_pages, dtype, is_native):
    rng = np.random.default_rng(n * h + z)
    t, rows = 24, 6
    longest = context_pages * z
    # From the start, from within a page, from its border, up to the last slot of the context.
    starts = [0, 0, z - 1, z, longest - t]
    lengths = [t, 1, min(z, t), t - 1, t]
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    shape = {"num_pages": 160, "k_heads": k_heads, "page_size": z, "head_dim": h}
    pool = Pool(rng, **shape, dtype=dtype, is_native=is_native)
    table_bm = pool.table(ends)
    pool.fill(table_bm, starts)
    kv = [random(rng, (rows, t, k_heads, h), dtype) for _ in range(2)]
    q = random(rng, (rows, t, n, h), dtype)
    out = prefill_chunk(
        pool, starts, lengths, table_bm, kv, q, rows=rows, context_pages=context_pages
    )
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        k_skh, v_skh = pool.sequence(table_bm[row], ends[row])
        for offset in range(length):
            seen = slice(0, start + offset + 1)
            expected = reference(q[row, offset], k_skh[seen], v_skh[seen])
            error = ulps(out[row, offset], expected, v_skh[seen], dtype)
            assert error < MAX_ULPS[dtype], (row, offset)
    # Padding, of a row and of the batch: nothing poisonous is handed on to the next layer.
    assert np.isfinite(out.astype(np.float32)).all()


@both_kinds
def test_chunks_are_one_prefill_and_decode_goes_on(is_native):
    rng = np.random.default_rng(4)
    n, k_heads, h, z, rows, context_pages = 4, 2, 64, 8, 3, 24
    totals = [96, 37]  # whole chunks, and a remainder
    shape = (rows, 96)
    q = random(rng, (*shape, n, h), "float32")
    kv = [random(rng, (*shape, k_heads, h), "float32") for _ in range(2)]
    results = []
    for t in (96, 32, 16):
        pool = Pool(rng, **{**POOL, "page_size": z}, is_native=is_native)
        table_bm = pool.table(totals)
        out = np.zeros(q.shape, np.float32)
        for start in range(0, max(totals), t):
            alive = [row for row, total in enumerate(totals) if start < total]
            lengths = [min(t, totals[row] - start) for row in alive]
            chunk = slice(start, start + t)
            part = prefill_chunk(
                pool,
                [start] * len(alive),
                lengths,
                table_bm[alive],
                [new[:, chunk] for new in kv],
                q[:, chunk],
                rows=rows,
                context_pages=context_pages,
            )
            for row, length in zip(alive, lengths, strict=True):
                out[row, start : start + length] = part[row, :length]
        results.append(out)
        # The last query again, as a decode step that finds its own token in the pages.
        batch = DecodeBatch(np.arange(2, dtype=np.int32), np.array(totals, np.int32) - 1, table_bm)
        blocks_ci = pack_blocks(batch, rows=2, blocks=3, page_size=z)
        last = np.stack([q[row, total - 1] for row, total in enumerate(totals)])
        decoded = decode(last, pool.k, pool.v, blocks_ci[:, 2:], blocks_ci[:, 0], blocks_ci[:, 1])
        for row, total in enumerate(totals):
            np.testing.assert_allclose(decoded[row], out[row, total - 1], rtol=0, atol=4e-6)
    for chunked in results[1:]:
        np.testing.assert_allclose(chunked, results[0], rtol=0, atol=4e-6)


def test_the_prefill_stage_is_deaf_to_what_others_left():
    """A request that overflowed in float16 must not spoil the next one in its pages."""
    model = LlamaConfig(
        num_layers=1,
        d_model=32,
        d_ffn=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        vocab_size=8,
        max_position_embeddings=64,
    )
    make_layer = weights.layer_maker(model, np.dtype("float32"))
    layers = tuple(
        jax.tree.leaves(weights.dummy(model, np.dtype("float32"), jax.devices()[0], seed=0).layers)
    )
    x_btd = random(np.random.default_rng(6), (2, 16, 32), "float32")
    batch = PrefillBatch(
        np.zeros((1, 16), np.int32),
        np.array([0], np.int32),
        np.array([5], np.int32),
        np.array([[3]], np.int32),
    )
    arrays = PrefillArrays(*map(jnp.asarray, pack_prefill(batch, rows=2, context_pages=8)))
    stage = jax.jit(partial(stages.layers_prefill, make_layer, 2))
    last = []
    for left in (0.0, np.nan):
        pages = (XlaPages(*(jnp.full((6, 1, 8, 16), left, jnp.float32) for _ in range(2))),)
        last.append(np.asarray(stage(layers, pages, x_btd, arrays)[1])[0])
    assert np.array_equal(*last)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_append_writes_its_slots_and_nothing_else(dtype):
    rng = np.random.default_rng(5)
    num_pages, k_heads, z, h = 7, 2, 8, 16
    pages = jnp.asarray(rng.choice([*POISONS, 1.5], (num_pages, k_heads, z, h)), dtype)
    new = random(rng, (6, k_heads, h), dtype)
    beyond = np.iinfo(np.int32).max
    page_ids = np.array([3, num_pages, 0, beyond, 6, 3], np.int32)
    slots = np.array([0, 2, 7, beyond, 5, 1], np.int32)
    expected = np.array(pages)
    for row in (0, 2, 4, 5):
        expected[page_ids[row], :, slots[row]] = new[row]
    assert np.array_equal(append(pages, new, page_ids, slots), expected, equal_nan=True)
