"""The memory plan: from bytes to pages, and a word to the user where that does not work out."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_jax import memory
from apex_jax.config import Config, ConfigError, LlamaConfig
from apex_jax.kv_cache import allocate, page_bytes
from apex_jax.memory import GIB, check_programs, free_device_bytes, free_host_bytes, plan_memory
from configs import llama_2_7b

F32, F16 = np.dtype("float32"), np.dtype("float16")
MODEL = LlamaConfig(
    num_layers=4,
    d_model=64,
    d_ffn=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=1000,
    max_position_embeddings=512,
)
DEEP = dataclasses.replace(MODEL, num_layers=64, max_position_embeddings=4096)
# Embedding and output; per layer q and o, k and v, three of the MLP, two norms; the last norm.
NUM_PARAMETERS = 2 * 64_000 + 4 * (2 * 4096 + 2 * 2048 + 3 * 8192 + 128) + 64
PAGE_BYTES = 2 * 4 * 2 * 16 * 16 * 4  # keys and values, layers, heads, width, tokens, float32


def config_of(**settings):
    config = Config()
    config.scheduler.max_requests, config.scheduler.strategy = 8, "device_only"
    for name, value in settings.items():
        owner = next(one for one in (config.cache, config.scheduler) if hasattr(one, name))
        setattr(owner, name, value)
    return config


@pytest.fixture
def plan(monkeypatch):
    """Plan as if that many bytes were free."""

    def plan_with(free_bytes, dtype=F32, model=MODEL, **settings):
        monkeypatch.setattr(memory, "free_device_bytes", lambda device: free_bytes)
        return plan_memory(config_of(**settings), model, dtype, jax.devices()[0])

    return plan_with


def test_bytes_are_those_of_the_arrays():
    assert page_bytes(MODEL, 16, F32) == PAGE_BYTES
    assert page_bytes(MODEL, 32, F16) == PAGE_BYTES
    pools = allocate(MODEL, 3, 16, F32, jax.devices()[0])
    assert sum(one.nbytes for one in jax.tree.leaves(pools)) == 3 * PAGE_BYTES
    assert all((np.asarray(one) == 0).all() for one in jax.tree.leaves(pools))


def test_a_budget_in_bytes_is_taken_as_it_is(plan):
    made = plan(GIB, device_bytes=100 * PAGE_BYTES + 7)
    assert (made.num_pages, made.page_bytes, made.page_size) == (100, PAGE_BYTES, 16)
    assert made.weight_bytes == NUM_PARAMETERS * 4
    assert made.pool_bytes == 100 * PAGE_BYTES
    assert made.pool_tokens == 1600
    assert made.max_model_len == 512
    assert made.free_bytes == GIB
    assert made.scratch_bytes > 0


def test_half_precision_holds_twice_the_tokens(plan):
    full, half = plan(GIB, device_bytes=10**6), plan(GIB, F16, device_bytes=10**6)
    assert half.weight_bytes * 2 == full.weight_bytes
    assert half.num_pages // 2 == full.num_pages


def test_an_unknown_free_memory_needs_a_budget(plan):
    assert plan(None, device_bytes=PAGE_BYTES).num_pages == 1
    with pytest.raises(ConfigError, match=r"does not say .* --config\.cache\.device_bytes"):
        plan(None)


def test_no_more_pages_than_all_requests_can_use(plan):
    assert plan(GIB).num_pages == 8 * 512 // 16
    assert plan(GIB, device_bytes=GIB // 2).num_pages == 8 * 512 // 16
    assert plan(GIB, max_model_len=17).num_pages == 8 * 2
    assert plan(GIB, max_model_len=17, page_size=32).num_pages == 8
    assert plan(GIB, max_requests=1).num_pages == 32


def test_what_the_cache_holds_limits_a_request(plan):
    assert plan(GIB, device_bytes=3 * PAGE_BYTES).max_model_len == 48
    assert plan(GIB, device_bytes=3 * PAGE_BYTES, max_model_len=48).max_model_len == 48
    with pytest.raises(
        ConfigError, match=r"max_model_len is 49; the KV cache holds 48 tokens in all \(3 pages\)"
    ):
        plan(GIB, device_bytes=3 * PAGE_BYTES, max_model_len=49)


@given(st.integers(2**20, 2**34), st.floats(0.05, 1.0), st.sampled_from([8, 16, 64]))
def test_an_automatic_pool_fits_and_leaves_little(free_bytes, fraction, page_size):
    config = config_of(device_fraction=fraction, page_size=page_size, max_requests=4096)
    with mock.patch.object(memory, "free_device_bytes", return_value=free_bytes):
        try:
            made = plan_memory(config, MODEL, F32, jax.devices()[0])
        except ConfigError:
            # A page, gathered twice; and the scratch of the head, or of 4,096 rows of blocks.
            least = page_bytes(MODEL, page_size, F32) * 3 / 2
            scratch = max(4096 * 1000 * 16, 4096 * 8 * least * 4 / 3 / MODEL.num_layers)
            assert (free_bytes - NUM_PARAMETERS * 4 - scratch) * fraction < least
            return
    gathered = 2 * made.pool_bytes / MODEL.num_layers
    budget = (free_bytes - made.weight_bytes - made.scratch_bytes) * fraction
    taken = made.pool_bytes + gathered
    assert taken <= budget
    # Programs depend on the page count: few values, each within an eighth of what would fit.
    assert made.num_pages % (1 << max(made.num_pages.bit_length() - 4, 0)) == 0
    if made.num_pages < 4096 * 512 // page_size:
        left = budget - taken
        assert left <= (made.num_pages / 8 + 1) * made.page_bytes * 3 / 2 + 1


def test_a_wavering_free_memory_gives_the_same_programs(plan):
    noises = range(0, 2**20, 9973)
    counts = {plan(600 * 2**20 + noise, max_requests=4096).num_pages for noise in noises}
    assert len(counts) <= 2
    assert min(counts) > 1000


def test_weights_that_do_not_fit_are_refused(plan):
    with pytest.raises(
        ConfigError, match=r"the weights take .* in float32, .* are free on .*float16"
    ):
        plan(NUM_PARAMETERS * 4 - 1)
    with pytest.raises(ConfigError, match=r"no memory is left .* size the cache yourself with"):
        plan(NUM_PARAMETERS * 4 + PAGE_BYTES)


def test_a_budget_without_a_page_is_refused(plan):
    with pytest.raises(ConfigError, match=rf"one page takes {PAGE_BYTES} bytes, .* at least that"):
        plan(GIB, device_bytes=PAGE_BYTES - 1)


def test_a_budget_beyond_the_device_is_refused(plan):
    left = GIB - NUM_PARAMETERS * 4
    assert plan(GIB, device_bytes=left).num_pages == 256
    with pytest.raises(ConfigError, match=rf"after the weights {left} bytes are free .* at most"):
        plan(GIB, device_bytes=left + 1)


# What is free


def device_with(stats):
    device = mock.Mock(spec=jax.Device)
    device.platform, device.device_kind = "gpu", "Tesla T4"
    device.memory_stats = lambda: stats
    return device


def test_a_gpu_tells_its_free_bytes():
    stats = {"bytes_limit": 1000, "bytes_in_use": 300, "num_allocs": 5}
    assert free_device_bytes(device_with(stats)) == 700
    assert free_device_bytes(device_with({"bytes_in_use": 300})) is None
    assert free_device_bytes(device_with(None)) is None


def test_a_cpu_has_the_free_bytes_of_the_host(monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 12345)
    assert free_device_bytes(jax.devices("cpu")[0]) == 12345


def test_this_machine_says_something_plausible():
    free_bytes = free_host_bytes()
    assert free_bytes is None or 0 < free_bytes < 2**50


MEMINFO = "MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:   1000 kB\nHugePages_Total: 0\n"
V1, V2 = (
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    (
        "memory.max",
        "memory.current",
    ),
)


@pytest.mark.parametrize(
    ("meminfo", "names", "limit", "used", "free"),
    [
        (None, None, None, None, None),  # not a Linux
        (MEMINFO, None, None, None, 1_024_000),
        ("MemTotal: 2000 kB\n", None, None, None, None),  # kernels before 3.14
        (MEMINFO, V2, "max", "500000", 1_024_000),
        (MEMINFO, V2, "800000", "500000", 300_000),
        (MEMINFO, V2, "9000000", "500000", 1_024_000),
        (MEMINFO, V1, "800000", "500000", 300_000),
        (MEMINFO, V1, "9223372036854771712", "500000", 1_024_000),  # its word for no limit
        (None, V2, "800000", "500000", 300_000),
        (MEMINFO, V2, "800000", None, 1_024_000),
    ],
)
def test_the_host_has_what_it_and_the_control_group_leave(
    tmp_path, meminfo, names, limit, used, free
):
    if meminfo is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/meminfo").write_text(meminfo)
    for name, text in zip(names or (), (limit, used), strict=False):
        if text is not None:
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
    assert free_host_bytes(tmp_path) == free


def test_files_that_were_read_do_not_count_as_used(tmp_path):
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("800000\n")
    (cgroup / "memory.current").write_text("500000\n")
    (cgroup / "memory.stat").write_text("anon 100000\ninactive_file 200000\n")
    assert free_host_bytes(tmp_path) == 500_000


def test_a_request_cannot_be_longer_than_the_model_knows_positions(plan):
    with pytest.raises(ConfigError, match=r"max_model_len is 513; the model was made for .* 512"):
        plan(GIB, max_model_len=513)


def test_an_automatic_pool_leaves_a_cpu_to_others(plan):
    made = plan(64 * GIB, max_requests=4096, page_size=128, model=DEEP)
    assert 0.85 * 4 * GIB < made.pool_bytes <= 4 * GIB
    asked = plan(64 * GIB, max_requests=4096, page_size=128, model=DEEP, device_bytes=6 * GIB)
    assert asked.pool_bytes > 5.9 * GIB


def test_a_t4_holds_a_7b_model_and_some_requests(monkeypatch):
    # The case the project exists for: 15 GiB, of which JAX takes 95 %, and 12.55 GiB of weights.
    config = llama_2_7b.get_config()
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: int(0.95 * 15 * GIB))
    made = plan_memory(config, config.model.architecture, F16, device_with(None))
    assert 1000 < made.pool_tokens < 3500


def test_what_was_compiled_must_fit_beside_the_rest(plan):
    made = plan(GIB, device_bytes=100 * PAGE_BYTES)
    left = GIB - made.weight_bytes - made.pool_bytes
    check_programs(made, left)
    with pytest.raises(ConfigError, match=r"weights .* need 1\.00 GiB, and 1\.00 are free; lower"):
        check_programs(made, left + 1)


# Two pools

HYBRID = {"strategy": "async_overlap", "max_host_requests": 16}


@pytest.fixture
def plan_both(monkeypatch):
    """Plan for a strategy with a host lane, on a GPU or on its stand-in with that much free."""

    def plan_with(free_bytes, host_free_bytes=None, model=MODEL, **settings):
        device = device_with(None) if host_free_bytes is not None else jax.devices("cpu")[0]
        host_free_bytes = free_bytes if host_free_bytes is None else host_free_bytes
        monkeypatch.setattr(memory, "free_device_bytes", lambda device: free_bytes)
        monkeypatch.setattr(memory, "free_host_bytes", lambda: host_free_bytes)
        return plan_memory(config_of(**HYBRID, **settings), model, F32, device)

    return plan_with


def test_without_a_host_lane_nothing_is_kept_for_it(plan):
    made = plan(GIB)
    assert (made.num_host_pages, made.host_pool_bytes, made.num_staging_pages) == (0, 0, 0)
    assert made.lane_bytes == 0


def test_a_host_budget_in_bytes_is_taken_as_it_is(plan_both):
    made = plan_both(GIB, GIB, host_bytes=100 * PAGE_BYTES + 7)
    assert (made.num_host_pages, made.host_pool_tokens) == (100, 1600)
    assert made.host_pool_bytes == 100 * PAGE_BYTES
    assert not made.is_shared


def test_no_more_host_pages_than_all_requests_can_use(plan_both):
    assert plan_both(GIB, GIB).num_host_pages == 16 * 512 // 16
    assert plan_both(GIB, GIB, host_bytes=GIB // 2, max_model_len=17).num_host_pages == 16 * 2
    # What cannot be used need not be free either.
    assert plan_both(GIB, 40 * PAGE_BYTES, host_bytes=GIB, max_model_len=17).num_host_pages == 32


def test_the_host_pool_takes_half_of_what_is_free(plan_both):
    made = plan_both(GIB, 1000 * PAGE_BYTES, max_requests=8)
    assert made.num_host_pages == 480  # 500 in four significant bits
    assert made.num_pages == 256


def test_a_cpu_divides_one_memory(plan_both):
    """Weights, scratch, the device's pages and what its programs gather, then the host's half."""
    made = plan_both(6 * 2**20, max_prefill_tokens=16, max_model_len=128)
    assert made.is_shared
    assert made.num_pages == 64
    needs = made.weight_bytes + made.scratch_bytes + made.lane_bytes + made.pool_bytes * 3 / 2
    left = 6 * 2**20 - needs
    assert made.num_host_pages == memory._round_down(int(left / 2 / PAGE_BYTES))
    assert 0 < made.host_pool_bytes < left / 2


@given(
    st.integers(2**21, 2**30),
    st.one_of(st.none(), st.integers(1, 2**30)),
    st.one_of(st.none(), st.integers(1, 2**30)),
    st.booleans(),
)
def test_what_is_planned_fits(free_bytes, device_bytes, host_bytes, is_shared):
    """Whatever is asked for: both pools and the rest fit, or a message names the flag."""
    config = config_of(**HYBRID, device_bytes=device_bytes, host_bytes=host_bytes, max_requests=512)
    device = jax.devices("cpu")[0] if is_shared else device_with(None)
    free = {"free_device_bytes": lambda _: free_bytes, "free_host_bytes": lambda: free_bytes}
    with mock.patch.multiple(memory, **free):
        try:
            made = plan_memory(config, MODEL, F32, device)
        except ConfigError as error:
            assert "--config.cache." in str(error)  # noqa: PT017
            return
    assert made.num_pages >= 1
    assert made.num_host_pages >= 1
    device_taken = made.weight_bytes + made.lane_bytes + made.pool_bytes
    assert device_taken + is_shared * made.host_pool_bytes <= free_bytes
    assert made.host_pool_bytes <= 0.9 * free_bytes
    if host_bytes is not None:
        assert host_bytes - PAGE_BYTES < made.host_pool_bytes or made.num_host_pages == 16 * 32
        assert made.host_pool_bytes <= host_bytes


def test_a_host_budget_beyond_the_host_is_refused_with_the_right_one(plan_both):
    right = 90 * PAGE_BYTES
    assert plan_both(GIB, 100 * PAGE_BYTES, host_bytes=right).num_host_pages == 90
    with pytest.raises(
        ConfigError,
        match=rf"--config\.cache\.host_bytes is {right + PAGE_BYTES}; {100 * PAGE_BYTES} bytes are "
        rf"free on the host \(.*\), and 90% of them may be taken, so it must be at most {right}$",
    ):
        plan_both(GIB, 100 * PAGE_BYTES, host_bytes=right + PAGE_BYTES)


def test_the_stand_in_needs_its_share_first(plan_both):
    settings = {"device_bytes": 40 * PAGE_BYTES, "max_model_len": 64, "max_prefill_tokens": 16}
    with pytest.raises(
        ConfigError, match=r"host_bytes is \d+; \d+ bytes are free .* stand-in"
    ) as e:
        plan_both(4 * 2**20, **settings, host_bytes=64 * PAGE_BYTES)
    right = int(str(e.value).split()[-1])
    made = plan_both(4 * 2**20, **settings, host_bytes=right)
    assert made.host_pool_bytes == right
    with pytest.raises(ConfigError, match=f"at most {right}"):
        plan_both(4 * 2**20, **settings, host_bytes=right + PAGE_BYTES)


def test_a_control_group_limits_the_host_pool(tmp_path, monkeypatch):
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text(f"{150 * PAGE_BYTES}\n")
    (cgroup / "memory.current").write_text(f"{50 * PAGE_BYTES}\n")
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: GIB)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: free_host_bytes(tmp_path))
    config = config_of(**HYBRID, host_bytes=91 * PAGE_BYTES)
    with pytest.raises(
        ConfigError,
        match=rf"{100 * PAGE_BYTES} bytes .*control group's .* at most {90 * PAGE_BYTES}",
    ):
        plan_memory(config, MODEL, F32, device_with(None))
    config.cache.host_bytes = None
    assert plan_memory(config, MODEL, F32, device_with(None)).num_host_pages == 48


def test_a_host_without_room_for_a_page_is_refused(plan_both, monkeypatch):
    with pytest.raises(ConfigError, match=rf"host_bytes is 5; one page takes {PAGE_BYTES} bytes"):
        plan_both(GIB, GIB, host_bytes=5)
    with pytest.raises(ConfigError, match=r"no memory is left for the host's KV cache: .*host_byt"):
        plan_both(GIB, 2 * PAGE_BYTES - 1)
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: GIB)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: None)
    config = config_of(**HYBRID)
    with pytest.raises(ConfigError, match=r"the host does not say .* --config\.cache\.host_bytes"):
        plan_memory(config, MODEL, F32, device_with(None))
    config.cache.host_bytes = 3 * PAGE_BYTES
    assert plan_memory(config, MODEL, F32, device_with(None)).num_host_pages == 3


def test_a_request_may_be_longer_than_the_device_holds(plan_both):
    settings = {"device_bytes": 3 * PAGE_BYTES}
    made = plan_both(GIB, GIB, **settings, host_bytes=10 * PAGE_BYTES)
    assert (made.pool_tokens, made.max_model_len, made.num_staging_pages) == (48, 160, 10)
    asked = plan_both(GIB, GIB, **settings, host_bytes=10 * PAGE_BYTES, max_model_len=100)
    assert (asked.max_model_len, asked.num_staging_pages) == (100, 7)
    small = plan_both(GIB, GIB, **settings, host_bytes=PAGE_BYTES)
    assert (small.max_model_len, small.num_staging_pages) == (48, 1)
    with pytest.raises(
        ConfigError,
        match=r"len is 161; .* 48 tokens in all \(3 pages\), the host's 160, .*host_byt",
    ):
        plan_both(GIB, GIB, **settings, host_bytes=10 * PAGE_BYTES, max_model_len=161)


def test_a_host_lane_takes_its_share_of_the_device(plan_both):
    """One layer of the longest request; pages in transit; and twice its hidden states."""
    layer_page = PAGE_BYTES // 4
    made = plan_both(GIB, GIB, max_prefill_tokens=64)
    assert made.num_staging_pages == 32
    assert made.lane_bytes == (32 + 256) * layer_page + 2 * (512 + 64) * 64 * 4
    short = plan_both(GIB, GIB, max_prefill_tokens=64, max_model_len=16)
    assert short.lane_bytes == (1 + 256) * layer_page + 2 * (16 + 64) * 64 * 4
    deep = plan_both(GIB, GIB, model=DEEP, max_prefill_tokens=64, page_size=8)
    assert deep.num_staging_pages == 512
    assert deep.lane_bytes == (512 + 512) * layer_page // 2 + 2 * (4096 + 64) * 64 * 4
    left = GIB - made.weight_bytes - made.lane_bytes
    with pytest.raises(ConfigError, match=rf"after the weights and .* lane needs {left} bytes"):
        plan_both(GIB, GIB, max_prefill_tokens=64, device_bytes=left + 1)


def test_heads_that_the_host_op_does_not_take_are_refused(plan_both):
    odd = dataclasses.replace(MODEL, head_dim=12)
    with pytest.raises(
        ConfigError, match=r"strategy is 'async_overlap'; .* have 12 .* device_only"
    ):
        plan_both(GIB, GIB, model=odd)


def test_both_pools_and_the_programs_must_fit_where_they_share_a_memory(plan_both):
    for host_free_bytes in (None, GIB):
        settings = {"device_bytes": 100 * PAGE_BYTES, "host_bytes": 50 * PAGE_BYTES}
        made = plan_both(GIB, host_free_bytes, **settings)
        left = GIB - made.weight_bytes - made.pool_bytes - made.lane_bytes
        left -= made.host_pool_bytes if host_free_bytes is None else 0
        check_programs(made, left)
        with pytest.raises(ConfigError, match=r"need 1\.00 GiB, and 1\.00 are free; lower"):
            check_programs(made, left + 1)
