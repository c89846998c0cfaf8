"""The host attention op called from JAX: exact, in place, an error for every wrong argument."""

import concurrent.futures
import functools
import inspect
import re

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from apex_jax.ops import host_attention, native_library

DTYPES = ("float32", "float16", "bfloat16")
# Values are averages of standard normals. The KV is what the pool holds, so its own rounding is no
# error; what remains is float32 arithmetic, and the output's rounding to its dtype.
SUM_ERROR = 4e-6
# XLA raises one if the call ran in the calling thread, the other if it did not.
CALL_ERRORS = (ValueError, jax.errors.JaxRuntimeError)
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture(scope="module", autouse=True)
def op():
    return native_library.load(num_threads=2)


@pytest.fixture
def threads_and_isa():
    """Set the op up in a test, and as it was afterwards."""
    yield native_library.configure
    native_library.configure(num_threads=2)


@pytest.fixture(params=("avx512_bf16", "avx512", "avx2", "neon", "portable"))
def isa(request, op, threads_and_isa):
    if request.param not in op.supported_isas:
        pytest.skip(f"this CPU does not run {request.param}")
    threads_and_isa(num_threads=2, isa=request.param)
    return request.param


def reference(q_bnh, pages_pk2zh, block_tables_bm, lengths_b, scale):
    """Attention in float64, one request and KV head after the other."""
    out = np.zeros(q_bnh.shape, np.float64)
    lse = np.zeros(q_bnh.shape[:2], np.float64)
    kv_heads, head_dim = pages_pk2zh.shape[1], pages_pk2zh.shape[4]
    group = q_bnh.shape[1] // kv_heads
    for row, length in enumerate(lengths_b):
        kv_mk2zh = pages_pk2zh[block_tables_bm[row]].astype(np.float64)
        kv_2ksh = kv_mk2zh.transpose(2, 1, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
        for head in range(q_bnh.shape[1]):
            k_sh, v_sh = kv_2ksh[:, head // group, :length]
            scores = scale * (k_sh @ q_bnh[row, head].astype(np.float64))
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v_sh / weights.sum()
            lse[row, head] = scores.max() + np.log(weights.sum())
    return out, lse


class Case:
    """A pool of random pages, NaN where no token lies, and rows that own random pages of it."""

    def __init__(self, seed, *, lengths, kv_heads, group, head_dim, page_size, kv_dtype, q_dtype):
        rng = np.random.default_rng(seed)
        lengths = np.asarray(lengths, np.int32)
        max_pages = -(-max(lengths) // page_size)
        num_pages = len(lengths) * max_pages + 2
        ids = rng.permutation(num_pages)[: len(lengths) * max_pages].astype(np.int32)
        self.tables = ids.reshape(len(lengths), max_pages)
        self.lengths = lengths
        shape = (num_pages, kv_heads, 2, page_size, head_dim)
        pages = rng.normal(size=shape).astype(ml_dtypes.finfo(kv_dtype).dtype)
        used = np.zeros((num_pages, page_size), bool)
        for row, length in zip(self.tables, lengths, strict=True):
            used[row] = np.arange(max_pages * page_size).reshape(-1, page_size) < length
        self.pages = np.where(used[:, None, None, :, None], pages, np.nan).astype(pages.dtype)
        q_shape = (len(lengths), kv_heads * group, head_dim)
        self.q = np.asarray(jnp.asarray(rng.normal(size=q_shape), q_dtype))
        self.scale = head_dim**-0.5

    def pool(self):
        num_pages, kv_heads, _, page_size, head_dim = self.pages.shape
        pool = host_attention.allocate_pool(
            num_pages, kv_heads, page_size, head_dim, self.pages.dtype
        )
        ids = jnp.arange(num_pages, dtype=jnp.int32)
        return host_attention.write_pages(pool, jnp.asarray(self.pages), ids)

    def attend(self, rows=slice(None)):
        arrays = (self.q[rows], self.tables[rows], self.lengths[rows])
        out, lse = host_attention.attend(self.pool(), *map(jnp.asarray, arrays))
        return np.asarray(out), np.asarray(lse)

    def reference(self):
        used_pages = np.nan_to_num(self.pages.astype(np.float64))
        return reference(self.q, used_pages, self.tables, self.lengths, self.scale)


def assert_close(found, expected):
    out, lse = found
    tolerance = SUM_ERROR + ROUNDING[out.dtype.name] * np.abs(expected[0])
    np.testing.assert_array_less(np.abs(out.astype(np.float64) - expected[0]), tolerance)
    np.testing.assert_array_less(np.abs(lse - expected[1]), 4 * SUM_ERROR)


@st.composite
def cases(draw):
    page_size = draw(st.sampled_from([8, 16, 24, 32, 64]))
    edges = [1, page_size - 1, page_size, page_size + 1, 511, 512, 513]
    length = st.one_of(st.sampled_from(edges), st.integers(1, 1100))
    return Case(
        draw(st.integers(0, 2**32 - 1)),
        lengths=draw(st.lists(length, min_size=1, max_size=4)),
        kv_heads=draw(st.integers(1, 4)),
        group=draw(st.integers(1, 9)),
        head_dim=draw(st.sampled_from([8, 40, 64, 72, 80, 96, 128, 256])),
        page_size=page_size,
        kv_dtype=draw(st.sampled_from(DTYPES)),
        q_dtype=draw(st.sampled_from(DTYPES)),
    )


@hypothesis.settings(
    max_examples=60,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
    ],
)
@hypothesis.given(case=cases())
def test_equals_float64(isa, case):
    assert_close(case.attend(), case.reference())


def llama_case(lengths, kv_dtype="bfloat16", group=4, seed=0, q_dtype="float32"):
    return Case(
        seed,
        lengths=lengths,
        kv_heads=2,
        group=group,
        head_dim=128,
        page_size=64,
        kv_dtype=kv_dtype,
        q_dtype=q_dtype,
    )


@functools.cache
def long_case(kv_dtype):
    case = llama_case([32768, 1, 32767], kv_dtype)
    return case, case.reference()


@pytest.mark.main_python
@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_equals_float64_at_32k_tokens(isa, kv_dtype):
    case, expected = long_case(kv_dtype)
    assert_close(case.attend(), expected)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 11])
def test_bfloat16_queries_equal_float64(isa, group):
    """Queries and keys of bfloat16 may be multiplied by instructions of their own."""
    case = llama_case([2000, 1, 515], group=group, q_dtype="bfloat16")
    assert_close(case.attend(), case.reference())


@pytest.mark.parametrize("q_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(isa, kv_dtype, q_dtype, threads_and_isa):
    case = llama_case([3000, 1, 700, 513, 64], kv_dtype, q_dtype=q_dtype)
    results = []
    for num_threads in (1, 2, 4):
        threads_and_isa(num_threads=num_threads, isa=isa)
        results.append(case.attend())
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, result, results[0])


@pytest.mark.parametrize("page_size", [8, 64])
def test_same_bits_in_any_batch(isa, page_size):
    case = Case(
        1,
        lengths=[900, 3, 65, 1500, 512],
        kv_heads=2,
        group=3,
        head_dim=80,
        page_size=page_size,
        kv_dtype="float16",
        q_dtype="bfloat16",
    )
    whole = case.attend()
    for rows in ([0], [3, 0], [4, 1, 2, 3, 0], [2, 2, 2], [1]):
        part = case.attend(rows)
        for found, expected in zip(part, whole, strict=True):
            np.testing.assert_array_equal(found, expected[rows])


def test_result_does_not_depend_on_the_caller():
    """XLA flushes subnormals on some threads and not on others; the op decides for itself."""
    case = llama_case([40], "float32")
    case.pages = (case.pages * np.float32(1e-39)).astype(np.float32)
    alone = case.attend()
    assert np.count_nonzero(alone[0]) == alone[0].size
    with concurrent.futures.ThreadPoolExecutor(4) as callers:
        for result in callers.map(lambda _: case.attend(), range(8)):
            jax.tree.map(np.testing.assert_array_equal, result, alone)


def test_nan_of_a_used_slot_is_kept():
    case = llama_case([100, 100])
    case.pages[case.tables[0, 0], 1, 1, 5, 7] = np.nan
    out, _ = case.attend()
    assert np.isnan(out[0, 4:, 7]).all()
    assert np.isfinite(out[1]).all()
    case.pages[case.tables[1, 1], 0, 0, 2, 3] = np.nan
    out, lse = case.attend()
    assert np.isnan(out[1, :4]).all()
    assert np.isnan(lse[1, :4]).all()


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("page_size", [8, 16, 24, 64])
def test_append_and_attend_equals_its_parts(kv_dtype, page_size):
    rng = np.random.default_rng(0)
    tables = jnp.asarray([[3, 1, 6, 9], [8, 0, 2, 5]], jnp.int32)
    together, apart = (host_attention.allocate_pool(10, 2, page_size, 64, kv_dtype) for _ in "ab")
    pages = np.full((10, 2, 2, page_size, 64), np.nan)
    for step in range(2 * page_size + 3):
        lengths = np.asarray([step + 1, max(1, step - 4)], np.int32)
        qkv = jnp.asarray(rng.normal(size=(2, 6 + 4, 64)), jnp.float16)
        q, k, v = jnp.split(qkv, (6, 8), axis=1)
        together, *found = host_attention.append_and_attend(
            together, qkv, tables, jnp.asarray(lengths)
        )
        apart = host_attention.append(apart, k, v, tables, jnp.asarray(lengths))
        expected = host_attention.attend(apart, q, tables, jnp.asarray(lengths))
        jax.tree.map(np.testing.assert_array_equal, tuple(found), tuple(expected))
        for row, length in enumerate(lengths):
            page, slot = tables[row, (length - 1) // page_size], (length - 1) % page_size
            pages[page, :, 0, slot], pages[page, :, 1, slot] = k[row], v[row]
    read = host_attention.read_pages(together, jnp.arange(10, dtype=jnp.int32))
    written = ~np.isnan(pages)
    np.testing.assert_array_equal(
        np.asarray(read)[written], pages.astype(read.dtype)[written], strict=True
    )


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_padding_rows_are_neither_read_nor_written(num_rows):
    """Their tables, lengths and values would be errors, or duplicates, if they counted."""
    rng = np.random.default_rng(num_rows)
    padding = slice(num_rows, None)
    qkv = rng.normal(size=(3, 4 + 4, 64)).astype(np.float32)
    tables = np.asarray([[0, 1], [2, 3], [4, 5]], np.int32)
    lengths = np.asarray([17, 5, 9], np.int32)
    qkv[padding], tables[padding], lengths[padding] = np.nan, 99, -7
    pages = jnp.asarray(rng.normal(size=(6, 2, 2, 16, 64)), jnp.bfloat16)
    ids = jnp.arange(6, dtype=jnp.int32)
    run = host_attention.append_and_attend
    results = []
    for rows, count in ((slice(None), jnp.asarray(num_rows, jnp.int32)), (slice(num_rows), None)):
        pool = host_attention.allocate_pool(6, 2, 16, 64, "bfloat16")
        pool = host_attention.write_pages(pool, pages, ids)
        arrays = (jnp.asarray(one[rows]) for one in (qkv, tables, lengths))
        pool, out, lse = run(pool, *arrays, count)
        results.append((host_attention.read_pages(pool, ids), out, lse))
    (pool, out, lse), (expected_pool, *expected) = results
    np.testing.assert_array_equal(pool, expected_pool)
    for found, wanted in zip((out, lse), expected, strict=True):
        np.testing.assert_array_equal(found[:num_rows], wanted)
        assert not np.asarray(found[padding]).any()


@pytest.mark.parametrize("num_pages", [1, 2, 3])
def test_padding_pages_are_neither_read_nor_written(num_pages):
    pages = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 16, 64)), jnp.float16)
    ids = np.asarray([4, 0, 2], np.int32)
    ids[num_pages:] = 99
    ids, count = jnp.asarray(ids), jnp.asarray(num_pages, jnp.int32)
    pool = host_attention.allocate_pool(5, 2, 16, 64, "float16")
    pool = host_attention.write_pages(pool, pages, ids, count)
    read = host_attention.read_pages(pool, ids, count)
    np.testing.assert_array_equal(read[:num_pages], pages[:num_pages])
    assert not np.asarray(read[num_pages:]).any()
    others = jnp.asarray([1, 3, *(page for page in (4, 0, 2)[num_pages:])], jnp.int32)
    assert not np.asarray(host_attention.read_pages(pool, others)).any()


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("page_size", [8, 16, 40, 128])
def test_pages_read_are_pages_written(kv_dtype, page_size):
    rng = np.random.default_rng(0)
    pages = jnp.asarray(rng.normal(size=(3, 2, 2, page_size, 72)), kv_dtype)
    ids = jnp.asarray([4, 0, 2], jnp.int32)
    pool = host_attention.write_pages(
        host_attention.allocate_pool(5, 2, page_size, 72, kv_dtype), pages, ids
    )
    np.testing.assert_array_equal(host_attention.read_pages(pool, ids), pages)
    others = host_attention.read_pages(pool, jnp.asarray([1, 3, 3], jnp.int32))
    np.testing.assert_array_equal(others, jnp.zeros_like(pages))
    wide = host_attention.write_pages(pool, pages.astype(jnp.float32), ids)
    np.testing.assert_array_equal(host_attention.read_pages(wide, ids), pages)


def small_call():
    """A valid pool, queries, tables and lengths; and keys and values to append."""
    pool = host_attention.allocate_pool(6, 2, 16, 64, "bfloat16")
    q = jnp.ones((2, 4, 64), jnp.float32)
    tables = jnp.asarray([[0, 1], [2, 3]], jnp.int32)
    return pool, q, q[:, :2], tables, jnp.asarray([17, 5], jnp.int32)


def test_pool_is_updated_in_place_and_never_copied():
    pool, q, kv, tables, lengths = small_call()
    address = pool.unsafe_buffer_pointer()
    ids = jnp.asarray([0, 5], jnp.int32)
    pages = host_attention.read_pages(pool, ids)
    pool = host_attention.append(pool, kv, kv, tables, lengths)
    pool = host_attention.write_pages(pool, pages, ids)
    pool, *_ = host_attention.append_and_attend(
        pool, jnp.concatenate([q, kv, kv], 1), tables, lengths
    )
    assert pool.unsafe_buffer_pointer() == address

    def layer(pool, q, kv, tables, lengths):
        """As an engine has it: inside a larger program, the next append fed by this attention."""
        for _ in range(3):
            qkv = jnp.concatenate([q, kv, kv], 1)
            pool, q, _ = host_attention.append_and_attend(pool, qkv, tables, lengths)
            kv = q[:, :2] * 2
            q = q + host_attention.attend(pool, q, tables, lengths)[0]
        return pool, q

    compiled = jax.jit(layer, donate_argnums=0).lower(pool, q, kv, tables, lengths).compile()
    pool_type = re.escape("bf16[6,2,2,16,64]")
    assert re.search(pool_type, compiled.as_text())
    assert not re.search(rf"{pool_type}\S* copy", compiled.as_text())
    pool, _ = compiled(pool, q, kv, tables, lengths)
    assert pool.unsafe_buffer_pointer() == address


def test_wrong_values_are_errors():
    pool, q, _, tables, lengths = small_call()

    def error_of(call, *arrays):
        with pytest.raises(CALL_ERRORS) as caught:
            jax.block_until_ready(call(*arrays))
        return str(caught.value)

    for row, length in ((0, 0), (1, -3), (1, 33), (0, 2**31 - 1)):
        wrong = lengths.at[row].set(length)
        message = rf"lengths\[{row}\] = {length}: must be from 1 to 32"
        assert re.search(message, error_of(host_attention.attend, pool, q, tables, wrong))
    for page in (-1, 6, 2**31 - 1, -(2**31)):
        wrong = tables.at[0, 1].set(page)
        message = rf"block_tables\[0, 1\] = {page}: must be in \[0, 6\)"
        assert re.search(message, error_of(host_attention.attend, pool, q, wrong, lengths))
        # The second row uses its first page alone.
        host_attention.attend(pool, q, tables.at[1, 1].set(page), lengths)
    message = r"page_ids\[1\] = 6: must be in \[0, 6\)"
    assert re.search(message, error_of(host_attention.read_pages, pool, jnp.asarray([0, 6])))


def test_wrong_values_leave_the_pool_to_its_owner():
    pool, q, kv, tables, lengths = small_call()
    qkv = jnp.concatenate([q, kv, kv], 1)
    pages = host_attention.read_pages(pool, jnp.asarray([0, 1]))
    with pytest.raises(ValueError, match=r"lengths\[1\] = 33: must be from 1 to 32"):
        host_attention.append(pool, kv, kv, tables, lengths.at[1].set(33))
    with pytest.raises(ValueError, match=r"block_tables\[0, 1\] = 6: must be in \[0, 6\)"):
        host_attention.append_and_attend(pool, qkv, tables.at[0, 1].set(6), lengths)
    same = jnp.asarray([[1, 1], [1, 0]], jnp.int32)
    with pytest.raises(ValueError, match="block_tables: two rows append to slot 4 of page 1"):
        host_attention.append(pool, kv, kv, same, jnp.asarray([21, 5]))
    with pytest.raises(ValueError, match="page_ids: page 3 is named twice"):
        host_attention.write_pages(pool, pages, jnp.asarray([3, 3]))
    with pytest.raises(ValueError, match=r"page_ids\[0\] = -1: must be in \[0, 6\)"):
        host_attention.write_pages(pool, pages, jnp.asarray([-1, 3]))
    with pytest.raises(ValueError, match="num_rows = 3: must be from 1 to 2"):
        host_attention.append(pool, kv, kv, tables, lengths, jnp.asarray(3, jnp.int32))
    one = jnp.asarray(1, jnp.int32)  # of two: what the other says is nothing to anybody
    pool = host_attention.append(pool, kv, kv, tables, lengths.at[1].set(33), one)
    host_attention.append(pool, kv, kv, tables, lengths)  # the pool is still there


def test_a_program_finds_wrong_values_when_it_runs():
    """Inside a larger program there is nothing to look at before: the pool is given away."""
    pool, q, kv, tables, lengths = small_call()
    qkv = jnp.concatenate([q, kv, kv], 1)
    pages = host_attention.read_pages(pool, jnp.asarray([0, 1]))
    calls = {
        r"lengths\[0\] = 0": (host_attention.append, kv, kv, tables, lengths.at[0].set(0)),
        r"block_tables\[1, 0\] = 9": (
            *(host_attention.append_and_attend, qkv, tables.at[1, 0].set(9), lengths),
        ),
        "page 3 is named twice": (host_attention.write_pages, pages, jnp.asarray([3, 3])),
    }
    for message, (function, *arrays) in calls.items():
        pool = host_attention.allocate_pool(6, 2, 16, 64, "bfloat16")
        program = jax.jit(function, donate_argnums=0)
        with pytest.raises(CALL_ERRORS, match=message):
            jax.block_until_ready(program(pool, *arrays))
        assert pool.is_deleted()


@pytest.mark.parametrize("count", [0, 3, -1, 2**31 - 1])
def test_a_count_beyond_the_padded_arrays_is_an_error(count):
    pool, q, kv, tables, lengths = small_call()
    count_array, ids = jnp.asarray(count, jnp.int32), jnp.asarray([0, 1], jnp.int32)
    qkv, pages = jnp.concatenate([q, kv, kv], 1), host_attention.read_pages(pool, ids)
    with pytest.raises(CALL_ERRORS, match=f"num_pages = {count}: must be from 1 to 2"):
        jax.block_until_ready(host_attention.read_pages(pool, ids, count_array))
    with pytest.raises(CALL_ERRORS, match=f"num_pages = {count}: must be from 1 to 2"):
        jax.block_until_ready(host_attention.write_pages(pool, pages, ids, count_array))
    pool = small_call()[0]
    with pytest.raises(CALL_ERRORS, match=f"num_rows = {count}: must be from 1 to 2"):
        jax.block_until_ready(
            host_attention.append_and_attend(pool, qkv, tables, lengths, count_array)
        )


def test_a_released_pool_is_an_error():
    pool, q, kv, tables, lengths = small_call()
    host_attention.append(pool, kv, kv, tables, lengths)
    with pytest.raises(ValueError, match="pool: it was released"):
        host_attention.attend(pool, q, tables, lengths)


def changed(position, change):
    """The arguments of attend with one of them changed."""
    pool, q, _, tables, lengths = small_call()
    arguments = [pool, q, tables, lengths]
    arguments[position] = change(arguments[position])
    return arguments


@pytest.mark.parametrize(
    ("position", "change", "error", "message"),
    [
        (0, lambda pool: pool[0], ValueError, r"pool: shape \(2, 2, 16, 64\): must be"),
        (0, lambda pool: pool[:, :, :1], ValueError, r"pool: shape \(6, 2, 1, 16, 64\)"),
        (0, lambda pool: pool.astype(jnp.int16), TypeError, "pool: dtype int16"),
        (1, lambda q: q[0], ValueError, r"q_bnh: shape \(4, 64\): must be \(2, any, 64\)"),
        (1, lambda q: q[:1], ValueError, r"q_bnh: shape \(1, 4, 64\): must be \(2, any, 64\)"),
        (1, lambda q: q[..., :8], ValueError, r"q_bnh: shape \(2, 4, 8\): must be \(2, any, 64\)"),
        (1, lambda q: q[:, :3], ValueError, "q_bnh: 3 query heads: no multiple of 2"),
        (1, lambda q: q[:, :0], ValueError, "q_bnh: 0 query heads"),
        (1, lambda q: q.astype(jnp.int32), TypeError, "q_bnh: dtype int32"),
        (2, lambda table: table[0], ValueError, r"block_tables_bm: shape \(2,\)"),
        (2, lambda table: table.astype(jnp.uint32), TypeError, "block_tables_bm: dtype uint32"),
        (3, lambda lengths: lengths[:1], ValueError, r"lengths_b: shape \(1,\): must be \(2\)"),
        (3, lambda lengths: lengths.astype(jnp.int16), TypeError, "lengths_b: dtype int16"),
    ],
)
def test_wrong_shapes_and_dtypes_are_errors(position, change, error, message):
    with pytest.raises(error, match=message):  # as it is without the tests' type checker
        inspect.unwrap(host_attention.attend)(*changed(position, change))


def test_wrong_arguments_of_the_others_are_errors():
    pool, q, kv, tables, lengths = small_call()
    append = inspect.unwrap(host_attention.append)
    with pytest.raises(ValueError, match=r"k_bkh: shape \(2, 4, 64\): must be \(2, 2, 64\)"):
        append(pool, q, kv, tables, lengths)
    with pytest.raises(TypeError, match="v_bkh: dtype float16, but k_bkh has float32"):
        append(pool, kv, kv.astype(jnp.float16), tables, lengths)
    both = inspect.unwrap(host_attention.append_and_attend)
    for heads, left in ((4, 0), (7, 3), (1, -3)):
        qkv = jnp.ones((2, heads, 64))
        with pytest.raises(ValueError, match=f"qkv_bjh: {heads} heads leave {left} query heads"):
            both(pool, qkv, tables, lengths)
    write = inspect.unwrap(host_attention.write_pages)
    with pytest.raises(ValueError, match=r"pages_ik2zh: shape .*: must be \(3, 2, 2, 16, 64\)"):
        write(pool, pool, jnp.asarray([0, 1, 2]))
    with pytest.raises(TypeError, match="num_rows: dtype float32: must be int32"):
        both(pool, jnp.ones((2, 8, 64)), tables, lengths, jnp.asarray(1.0))
    with pytest.raises(ValueError, match=r"num_pages: shape \(2,\): must be \(\)"):
        inspect.unwrap(host_attention.read_pages)(pool, lengths, lengths)
    with pytest.raises(ValueError, match="scale = nan"):
        host_attention.attend(pool, q, tables, lengths, float("nan"))
    for wrong, message in (
        ((0, 2, 16, 64, "float16"), "num_pages = 0: must be at least 1"),
        ((4, 2, 12, 64, "float16"), "page_size = 12: must be a multiple of 8"),
        ((4, 2, 16, 65, "float16"), "head_dim = 65: must be a multiple of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            host_attention.allocate_pool(*wrong)
    with pytest.raises(TypeError, match="dtype = int8"):
        host_attention.allocate_pool(4, 2, 16, 64, "int8")


def test_a_pool_lies_on_the_device_it_is_asked_for():
    for device in (None, *jax.devices("cpu")):
        pool = host_attention.allocate_pool(2, 1, 8, 8, "float32", device)
        assert pool.devices() == {device or jax.devices("cpu")[0]}


def test_wrong_settings_are_errors(op, tmp_path):
    with pytest.raises(ValueError, match=r"isa = 'sse9': this CPU runs .*portable"):
        native_library.configure(isa="sse9")
    with pytest.raises(ValueError, match="num_threads = 0"):
        native_library.configure(num_threads=0)
    with pytest.raises(ValueError, match="cpus: 99999 is not one of"):
        native_library.configure(cpus=[99999])
    with pytest.raises(ValueError, match=r"numa_node = 4096: .* does not exist"):
        native_library.configure(numa_node=4096)
    with pytest.raises(ValueError, match="this process has loaded"):
        native_library.load(tmp_path / "other.so")


def test_threads_may_be_pinned(op, threads_and_isa):
    cpus = sorted(native_library.usable_cpus())
    assert threads_and_isa(num_threads=2, cpus=cpus).cpus == tuple(cpus)
    case = llama_case([600, 20])
    assert_close(case.attend(), case.reference())


@pytest.mark.main_python
@hypothesis.settings(max_examples=150)
@hypothesis.given(data=st.data())
def test_handlers_refuse_or_answer_whatever_they_are_given(data):
    """Random ranks, sizes, dtypes and values, past Python's checks: an error, never a crash."""
    sizes = st.sampled_from([0, 1, 2, 3, 8, 16, 24])

    def draw_array(rank, dtype=None):
        rank = data.draw(st.sampled_from([rank] * 8 + [0, 1, 2, 3, 4, 5]))
        shape = tuple(data.draw(sizes) for _ in range(rank))
        dtypes = ["float32", "float16", "bfloat16", "int32", "int8"]
        dtype = dtype or data.draw(st.sampled_from(dtypes))
        return jnp.full(shape, data.draw(st.integers(-2, 40)), dtype)

    pool_shape = (3, *(data.draw(sizes) for _ in range(1)), 2, 8, 8)
    pool = draw_array(5) if data.draw(st.booleans()) else jnp.ones(pool_shape, jnp.float16)
    tables, lengths = draw_array(2, "int32"), draw_array(1, "int32")
    page_ids, rows = draw_array(1, "int32"), [draw_array(3), draw_array(3)]
    count = draw_array(0, "int32")
    result = jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype)
    lse = jax.ShapeDtypeStruct(rows[0].shape[:2], jnp.float32)
    pool_like = jax.ShapeDtypeStruct(pool.shape, pool.dtype)
    scale = {"scale": np.float32(1)}
    calls = {
        "append": ((*rows, tables, lengths), pool_like, {}),
        "attend": ((rows[0], tables, lengths), (result, lse), scale),
        "append_and_attend": ((rows[0], tables, lengths, count), (pool_like, result, lse), scale),
        "write_pages": ((draw_array(5), page_ids, count), pool_like, {}),
        "read_pages": ((page_ids, count), draw_array(5), {}),
    }
    name = data.draw(st.sampled_from(sorted(calls)))
    arrays, results, attributes = calls[name]
    results = jax.tree.map(lambda like: jax.ShapeDtypeStruct(like.shape, like.dtype), results)
    aliases = {} if name in ("attend", "read_pages") else {0: 0}
    call = jax.ffi.ffi_call(f"apex_{name}", results, input_output_aliases=aliases)
    try:
        jax.block_until_ready(call(pool, *arrays, **attributes))
    except CALL_ERRORS as error:
        assert re.search("INVALID_ARGUMENT|rank|dtype", str(error))  # noqa: PT017
