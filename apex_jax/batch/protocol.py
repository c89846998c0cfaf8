"""What a batch job needs of an engine, and nothing more: tests put a fake one in its place."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from apex_jax.config import Config, LlamaConfig
from apex_jax.request import Request, RequestOutput
from apex_jax.timeline import Timeline


@runtime_checkable
class BatchModel(Protocol):
    """The loaded model, as a job identifies it."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def architecture(self) -> LlamaConfig: ...


@runtime_checkable
class BatchEngine(Protocol):
    """Requests in, finished ones out, one sweep at a time.

    num_output_tokens: decoded so far, those of unfinished requests included.
    num_unfinished: submitted and not yet returned by `step`. num_waiting: those of them that are
    not yet admitted. `submit` raises RequestError for a request that can never run, `cancel` drops
    one without a result and says whether it was there. `metrics` has JSON values only; the summary
    shows, where present, `compile_sec` (float), `peak_bytes` (bytes by tier), `prefix_reuse`
    (`admitted_tokens`, `reused_tokens`, `hit_rate`) and `hybrid`, of an engine with a host lane:
    `num_merges`, `num_extra_passes`, `num_late` and what overlap.Figures.to_json returns.
    `log_decisions` names who gets an entry for each sweep, of an engine whose strategy chooses.
    """

    @property
    def model(self) -> BatchModel: ...
    @property
    def num_unfinished(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> bool: ...
    def step(self) -> list[RequestOutput]: ...
    def describe(self) -> str: ...
    def log_decisions(self, on_decision: Callable[[dict[str, Any]], None]) -> None: ...
    def metrics(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


# The engine reports what it does to the timeline.
CreateEngine = Callable[[Config, Callable[[str], None], Timeline], BatchEngine]
