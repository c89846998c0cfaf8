"""Twins of what stands beside the xla backend: a host lane in numpy, completions that poll."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from apex_jax.buckets import smallest_that_holds
from apex_jax.hardware import HostAttention, ReadPages, WritePages


class PollingCompletions:
    def __init__(self):
        self.handles = []  # of all stages

    def enqueued(self, handle, stage, start_sec):
        self.handles.append(handle)

    def submitted(self, handle):
        assert isinstance(handle.marker, Future)

    def wait_any(self, handles, deadline_sec):
        while True:
            for handle in handles:
                marker = handle.marker
                if marker.done() if isinstance(marker, Future) else marker.is_ready():
                    return handle
            if time.perf_counter() > deadline_sec:
                return None
            time.sleep(1e-4)


class NumpyHostLane:
    """Jobs in order on one thread, over float32 pools [l, p, k, 2, z, h]."""

    def __init__(self, model, num_pages, buckets, device):
        shape = (model.num_layers, num_pages, model.num_kv_heads, 2, buckets.page_size)
        self.pools = np.full((*shape, model.head_dim), np.nan, np.float32)
        self._buckets, self._device = buckets, device
        self._worker = ThreadPoolExecutor(1)

    def submit(self, job, operand=None):
        return self._worker.submit(self._run, job, operand)

    def close(self):
        self._worker.shutdown()

    def _run(self, job, operand):
        pool = self.pools[job.layer]
        if isinstance(job, ReadPages):
            size = smallest_that_holds(self._buckets.host.move_pages, len(job.pages_i))
            pages_ik2zh = np.zeros((size, *pool.shape[1:]), np.float32)
            pages_ik2zh[: len(job.pages_i)] = pool[job.pages_i]
            return jax.device_put(pages_ik2zh, self._device)
        arrived = np.asarray(operand)
        if isinstance(job, WritePages):
            pool[job.pages_i] = arrived[: len(job.pages_i)]
            return None
        assert isinstance(job, HostAttention)
        return jax.device_put(append_and_attend(pool, arrived, job.batch), self._device)


def append_and_attend(pool_pk2zh, qkv_bjh, batch):
    """Return attended rows [b, n, h], zeros for padding; writes to the pool."""
    _, k_heads, _, z, h = pool_pk2zh.shape
    q_bnh, k_bkh, v_bkh = np.split(qkv_bjh, [-2 * k_heads, -k_heads], axis=1)
    out_bnh = np.zeros_like(q_bnh)
    for row, position in enumerate(batch.positions_b.tolist()):
        table = batch.block_table_bm[row]
        pool_pk2zh[table[position // z], :, 0, position % z] = k_bkh[row]
        pool_pk2zh[table[position // z], :, 1, position % z] = v_bkh[row]
        pages = pool_pk2zh[table[: position // z + 1]]  # [m, k, 2, z, h]
        kv = pages.transpose(2, 1, 0, 3, 4).reshape(2, k_heads, -1, h)[:, :, : position + 1]
        q_kgh = q_bnh[row].reshape(k_heads, -1, h)
        scores = np.einsum("kgh,ksh->kgs", q_kgh, kv[0]) * h**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out_bnh[row] = np.einsum("kgs,ksh->kgh", weights, kv[1]).reshape(-1, h)
    return out_bnh
