"""An engine without a model: tokens are a function of the request, and finish out of order.

Run as a script it is launch.generate with this engine; the environment sets FAKE_STEP_SEC, the
seconds a sweep takes, and FAKE_FINGERPRINT, the model's.
"""

import functools
import hashlib
import os
import sys
import time
from dataclasses import asdict, dataclass, field

from apex_jax.batch.lines import canonical_json
from apex_jax.config import Config, LlamaConfig
from apex_jax.request import FinishReason, Request, RequestError, RequestOutput
from apex_jax.timeline import Timeline

VOCAB_SIZE = 300
MAX_MODEL_LEN = 200
TINY = LlamaConfig(
    num_layers=1,
    d_model=8,
    d_ffn=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=MAX_MODEL_LEN,
)


@dataclass
class FakeModel:
    name: str = "fake"
    fingerprint: str = "f00d"
    dtype: str = "float32"
    architecture: LlamaConfig = field(default_factory=lambda: TINY)


def fake_tokens(request: Request) -> tuple[int, ...]:
    """What the request yields, whenever and wherever it runs."""
    what = {"prompt": request.prompt_token_ids, "sampling": asdict(request.sampling)}
    digest = hashlib.sha256(canonical_json(what)).digest()
    tokens = tuple(digest[i % 32] for i in range(1 + digest[0] % request.sampling.max_tokens))
    if request.is_last is not None:
        num_tokens = next((i for i, one in enumerate(tokens, 1) if request.is_last(one)), None)
        tokens = tokens[:num_tokens]
    return tokens


class FakeEngine:
    """Counts as well: most_waiting is the longest its queue has been."""

    def __init__(
        self,
        config: Config,
        timeline: Timeline,
        step_sec: float = 0.0,
        fingerprint: str = "f00d",
    ) -> None:
        self.timeline = timeline
        self.model = FakeModel(fingerprint=fingerprint)
        self.config = config
        self.step_sec = step_sec
        self.waiting: list[Request] = []
        self.running: dict[str, tuple[Request, int, float]] = {}
        self.is_closed = False
        self.num_sweeps = 0
        self.num_output_tokens = 0
        self.most_waiting = 0
        self.submitted: list[str] = []

    @classmethod
    def create(cls, config, on_progress, timeline, **kwargs):
        on_progress("compiling nothing")
        return cls(config, timeline, **kwargs)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def submit(self, request: Request) -> None:
        num_tokens = len(request.prompt_token_ids) + request.sampling.max_tokens
        if num_tokens > MAX_MODEL_LEN:
            raise RequestError(f"{num_tokens} tokens, and the limit is {MAX_MODEL_LEN}")
        outside = [one for one in request.prompt_token_ids if one >= VOCAB_SIZE]
        if outside:
            raise RequestError(f"token id {outside[0]} is outside the vocabulary of {VOCAB_SIZE}")
        assert request.request_id not in self.submitted, "submitted twice"
        self.submitted.append(request.request_id)
        self.waiting.append(request)
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def cancel(self, request_id: str) -> bool:
        self.waiting = [one for one in self.waiting if one.request_id != request_id]
        self.running.pop(request_id, None)
        return True

    def step(self) -> list[RequestOutput]:
        start_sec = time.perf_counter()
        time.sleep(self.step_sec)
        self.num_sweeps += 1
        while self.waiting and len(self.running) < self.config.scheduler.max_requests:
            request = self.waiting.pop(0)
            sweeps = hashlib.sha256(request.request_id.encode()).digest()[0] % 7
            self.running[request.request_id] = (request, self.num_sweeps + sweeps, time.monotonic())
        self.timeline.span(
            "device", "sweep", start_sec, time.perf_counter(), requests=list(self.running)
        )
        done = [name for name, (_, due, _) in self.running.items() if due <= self.num_sweeps]
        outputs: list[RequestOutput] = []
        for name in done:
            request, _, arrival_sec = self.running.pop(name)
            tokens = fake_tokens(request)
            self.num_output_tokens += len(tokens)
            short = len(tokens) < request.sampling.max_tokens
            reason = FinishReason.STOP if short else FinishReason.LENGTH
            now = time.monotonic()
            outputs.append(
                RequestOutput(request, tokens, reason, arrival_sec, arrival_sec + 1e-4, now, 0, 0)
            )
        return outputs

    def close(self) -> None:
        self.is_closed = True

    def describe(self) -> str:
        return "strategy   fake"

    def log_decisions(self, on_decision):
        self.on_decision = on_decision

    def metrics(self):
        return {
            "compile_sec": 1.5,
            "peak_bytes": {"device": 3 * 2**30, "host": 5 * 2**20},
            "sweeps": self.num_sweeps,
        }


if __name__ == "__main__":
    from absl import app

    from launch import generate

    create = functools.partial(
        FakeEngine.create,
        step_sec=float(os.environ.get("FAKE_STEP_SEC", "0")),
        fingerprint=os.environ.get("FAKE_FINGERPRINT", "f00d"),
    )
    app.run(
        functools.partial(generate.main, create=create),
        argv=sys.argv,
        flags_parser=generate.parse_flags,
    )
