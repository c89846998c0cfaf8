"""Every setting of a job as plain dataclasses, and their validation.

Owns names, defaults and ranges; refuses values out of range with the flag's name. The classes are
mutable because ml_collections overrides them from flags; `validate` is called once, afterwards, and
nothing changes them from then on. Imports no jax.
"""

import math
import re
from dataclasses import dataclass, field

DTYPES = ("auto", "float32", "bfloat16", "float16")
PLATFORMS = ("auto", "cpu", "gpu")
ATTENTIONS = ("auto", "xla", "native")
STRATEGIES = (
    "apex",
    "apex_paper",
    "device_only",
    "full_offload",
    "asymmetric_pipelining",
    "async_overlap",
    "staggered",
    "passes",
)
HOST_ISAS = ("avx512", "avx2", "neon", "portable")
ROPE_SCALINGS = ("default", "linear", "llama3")


class ConfigError(ValueError):
    """A setting that cannot be honoured; the message names the flag, the value and the remedy."""


@dataclass
class RopeConfig:
    """Rotary position embedding. `scaling` is default, linear or llama3."""

    theta: float = 10_000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass
class LlamaConfig:
    """The shape of a Llama model, in the names of this project."""

    num_layers: int
    d_model: int
    d_ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)

    @property
    def num_parameters(self) -> int:
        attention = self.d_model * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.d_model * self.d_ffn + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.d_model

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


@dataclass
class ModelConfig:
    """Which model, and from where.

    path: a folder with config.json and safetensors or an Orbax checkpoint; None needs
        weights=dummy.
    weights: "checkpoint", or "dummy" for random weights of the right shape (benchmarks).
    dtype: of weights, activations and KV cache. "auto" is the checkpoint's on a GPU that computes
        in it (float16 for bfloat16 where it does not), float32 on a CPU.
    precision: of float32 matrix products: "default" lets a GPU round them to TF32, "highest" does
        not.
    architecture: the expected shape; None reads it from the folder, and where both exist they must
        agree.
    seed: of dummy weights.
    """

    path: str | None = None
    weights: str = "checkpoint"
    dtype: str = "auto"
    precision: str = "default"
    architecture: LlamaConfig | None = None
    seed: int = 0


@dataclass
class CacheConfig:
    """Paged KV cache.

    device_bytes: budget of the device pool; None takes device_fraction of what is free after the
        weights (on a CPU at most 4 GiB, and never more than max_requests requests of max_model_len
        tokens can use).
    host_bytes: budget of the host pool, for strategies with a host lane; None takes half of what is
        free there (and never more than max_host_requests requests of max_model_len tokens can use).
    page_size: tokens per page, in both pools.
    prefix_reuse: requests that begin with the same tokens share the full pages of these, which stay
        for later ones as long as nobody needs the memory.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    device_fraction: float = 0.9
    page_size: int = 16
    prefix_reuse: bool = True


@dataclass
class SchedulerConfig:
    """What may run together.

    strategy: how host and device share the work (docs/strategies.md): apex chooses by prediction
        each sweep, apex_paper by the published rule; device_only, full_offload,
        asymmetric_pipelining, async_overlap, staggered and passes are fixed.
    cohorts: groups in which host-lane requests move through the layers, for `staggered` and
        `passes`; the other strategies have one or two.
    passes: layers a cohort may advance per sweep, for `passes`.
    max_host_tpot_sec, max_device_tpot_sec: for `apex`, the longest predicted time per output token
        in a lane; schedules of the host lane beyond them are not chosen. None for no bound.
    max_requests: requests on the device that decode or prefill at once.
    max_host_requests: likewise on the host.
    max_prefill_tokens: prompt tokens per sweep; long prompts are cut into chunks of this size.
    max_model_len: prompt plus output tokens a request may reach; None is the model's own limit, or
        what the KV cache holds where that is less.
    watchdog_sec: how long nothing may move before the job is failed; a sweep takes seconds at the
        worst, a first use of a GPU library some more.
    """

    strategy: str = "apex"
    cohorts: int = 2
    passes: int = 2
    max_host_tpot_sec: float | None = None
    max_device_tpot_sec: float | None = None
    max_requests: int = 64
    max_host_requests: int = 128
    max_prefill_tokens: int = 512
    max_model_len: int | None = None
    watchdog_sec: float = 300.0

    @property
    def has_host_lane(self) -> bool:
        return self.strategy != "device_only"

    @property
    def chooses(self) -> bool:
        """Whether the strategy chooses a schedule each sweep."""
        return self.strategy in ("apex", "apex_paper")

    @property
    def predicts(self) -> bool:
        """Whether the strategy goes by stage times."""
        return self.chooses or self.strategy == "asymmetric_pipelining"

    @property
    def max_running(self) -> int:
        """Requests that may run at once, in both lanes together."""
        return self.max_requests + (self.max_host_requests if self.has_host_lane else 0)


@dataclass
class SamplingDefaults:
    """What a request gets where its line does not say (the OpenAI API's defaults).

    Meanings are those of request.SamplingParams; seed is mixed with each request's id into that
    request's own seed.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass
class DeviceConfig:
    """Where the model runs.

    platform: auto (a GPU where there is one), cpu or gpu. attention: xla, or native (the host
    attention op, on a CPU without a host lane: faster there); auto is native where it can be.
    """

    platform: str = "auto"
    attention: str = "auto"


@dataclass
class HostConfig:
    """The host lane's worker and its attention op.

    threads: of the op; None for one fewer than the CPUs it may use, which leaves one to Python.
    cpus: where they run, such as "2,4-7"; empty for anywhere. numa_node: the node whose CPUs are
    taken instead. isa: instruction set of the kernel (avx512, avx2, neon, portable); empty for the
    best.
    """

    threads: int | None = None
    cpus: str = ""
    numa_node: int | None = None
    isa: str = ""


@dataclass
class CompileConfig:
    """cache_dir: folder that keeps compiled programs between runs; empty for none.

    layers_per_program: decoder layers compiled into one program; None picks a divisor of the layer
        count, so that a deep model compiles a few layers once and runs them several times; with a
        host lane a smaller one.
    """

    cache_dir: str = "~/.cache/apex_jax/xla"
    layers_per_program: int | None = None


@dataclass
class ProfileConfig:
    """Times of stages, for strategies that predict.

    cache_dir: folder that keeps what launch/run_profiler.py measures; empty for none. recalibrate:
    measure at every start, for seconds, even where a profile was kept.
    """

    cache_dir: str = "~/.cache/apex_jax/profiles"
    recalibrate: bool = False


@dataclass
class Config:
    """Everything a job can be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    host: HostConfig = field(default_factory=HostConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


def _require(ok: bool, flag: str, value: object, right: str) -> None:
    if not ok:
        raise ConfigError(f"--config.{flag} is {value!r}; it must be {right}")


def parse_cpus(text: str) -> tuple[int, ...]:
    """Return the CPUs of a list such as "2,4-7", in its order; ValueError says what is wrong."""
    cpus: list[int] = []
    for part in text.split(",") if text.strip() else ():
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"{part!r} is neither a CPU nor a range of them")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{part!r} ends before it begins")
        cpus += range(first, last + 1)
    if len(set(cpus)) < len(cpus):
        raise ValueError("it names a CPU twice")
    return tuple(cpus)


def validate(config: Config) -> None:
    """Raise ConfigError at the first setting out of its range.

    Not of `sampling`: those ranges are SamplingParams', and `check_defaults` of batch applies them.
    """
    _validate_model(config.model)
    cache, scheduler = config.cache, config.scheduler
    device_bytes, fraction, page_size = cache.device_bytes, cache.device_fraction, cache.page_size
    _require(
        device_bytes is None or device_bytes > 0, "cache.device_bytes", device_bytes, "positive"
    )
    host_bytes = cache.host_bytes
    _require(host_bytes is None or host_bytes > 0, "cache.host_bytes", host_bytes, "positive")
    _require(0 < fraction <= 1, "cache.device_fraction", fraction, "above 0 and at most 1")
    _require(
        page_size in (8, 16, 32, 64, 128), "cache.page_size", page_size, "8, 16, 32, 64 or 128"
    )
    _require(
        scheduler.strategy in STRATEGIES,
        "scheduler.strategy",
        scheduler.strategy,
        "one of " + ", ".join(STRATEGIES),
    )
    requests, prefill = scheduler.max_requests, scheduler.max_prefill_tokens
    _require(1 <= requests <= 4096, "scheduler.max_requests", requests, "1 to 4096")
    host_requests, cohorts, passes = (
        scheduler.max_host_requests,
        scheduler.cohorts,
        scheduler.passes,
    )
    _require(1 <= host_requests <= 4096, "scheduler.max_host_requests", host_requests, "1 to 4096")
    _require(cohorts >= 1, "scheduler.cohorts", cohorts, "at least 1")
    _require(passes >= 1, "scheduler.passes", passes, "at least 1")
    for name, tpot_sec in (
        ("max_host_tpot_sec", scheduler.max_host_tpot_sec),
        ("max_device_tpot_sec", scheduler.max_device_tpot_sec),
    ):
        _require(tpot_sec is None or tpot_sec > 0, f"scheduler.{name}", tpot_sec, "above 0")
    _require(
        prefill >= 16 and prefill & (prefill - 1) == 0,
        "scheduler.max_prefill_tokens",
        prefill,
        "a power of two, at least 16",
    )
    limit = scheduler.max_model_len
    _require(limit is None or limit > 1, "scheduler.max_model_len", limit, "at least 2")
    watchdog_sec = scheduler.watchdog_sec
    _require(watchdog_sec > 0, "scheduler.watchdog_sec", watchdog_sec, "above 0")
    platform = config.device.platform
    _require(platform in PLATFORMS, "device.platform", platform, "one of " + ", ".join(PLATFORMS))
    attention = config.device.attention
    _require(
        attention in ATTENTIONS, "device.attention", attention, "one of " + ", ".join(ATTENTIONS)
    )
    _validate_host(config.host)
    _require(
        scheduler.predicts or not config.profile.recalibrate,
        "profile.recalibrate",
        True,
        f"left out: {scheduler.strategy} goes by no stage times",
    )
    span = config.compile.layers_per_program
    _require(span is None or span > 0, "compile.layers_per_program", span, "positive")


def _validate_host(host: HostConfig) -> None:
    threads, node = host.threads, host.numa_node
    _require(threads is None or 1 <= threads <= 1024, "host.threads", threads, "1 to 1024")
    try:
        parse_cpus(host.cpus)
    except ValueError as error:
        raise ConfigError(
            f"--config.host.cpus is {host.cpus!r}: {error}; it must be a list such as 2,4-7"
        ) from None
    _require(node is None or node >= 0, "host.numa_node", node, "at least 0")
    _require(
        node is None or not host.cpus, "host.numa_node", node, "left out where host.cpus is given"
    )
    isas = "empty or one of " + ", ".join(HOST_ISAS)
    _require(not host.isa or host.isa in HOST_ISAS, "host.isa", host.isa, isas)


def _validate_model(model: ModelConfig) -> None:
    sources = ("checkpoint", "dummy")
    _require(model.weights in sources, "model.weights", model.weights, "checkpoint or dummy")
    precisions = ("default", "highest")
    _require(
        model.precision in precisions, "model.precision", model.precision, "default or highest"
    )
    _require(model.dtype in DTYPES, "model.dtype", model.dtype, "one of " + ", ".join(DTYPES))
    if model.weights == "checkpoint":
        _require(
            bool(model.path), "model.path", model.path, "a model folder (or set weights=dummy)"
        )
    elif not model.path:
        _require(
            model.architecture is not None,
            "model.path",
            model.path,
            "a model folder, whose config.json gives the shape of the dummy weights",
        )
    if model.architecture is not None:
        _validate_architecture(model.architecture)


def _validate_architecture(model: LlamaConfig) -> None:
    """Raise ConfigError for a shape that is no Llama's; a model folder is read by hf_config."""

    def require(ok: bool, name: str, value: object, right: str) -> None:
        _require(ok, f"model.architecture.{name}", value, right)

    for name, count in (
        ("num_layers", model.num_layers),
        ("d_model", model.d_model),
        ("d_ffn", model.d_ffn),
        ("num_heads", model.num_heads),
        ("num_kv_heads", model.num_kv_heads),
        ("head_dim", model.head_dim),
        ("vocab_size", model.vocab_size),
        ("max_position_embeddings", model.max_position_embeddings),
        ("rope.original_max_position_embeddings", model.rope.original_max_position_embeddings),
    ):
        require(count >= 1, name, count, "at least 1")
    heads, kv_heads, rope = model.num_heads, model.num_kv_heads, model.rope
    require(
        heads % kv_heads == 0, "num_kv_heads", kv_heads, f"a divisor of the {heads} of num_heads"
    )
    require(model.head_dim % 2 == 0, "head_dim", model.head_dim, "even: RoPE rotates pairs")
    for name, value in (
        ("rms_norm_eps", model.rms_norm_eps),
        ("rope.theta", rope.theta),
        ("rope.low_freq_factor", rope.low_freq_factor),
        ("rope.high_freq_factor", rope.high_freq_factor),
    ):
        require(0 < value < math.inf, name, value, "a positive number")
    require(
        rope.scaling in ROPE_SCALINGS,
        "rope.scaling",
        rope.scaling,
        "one of " + ", ".join(ROPE_SCALINGS),
    )
    require(1 <= rope.factor < math.inf, "rope.factor", rope.factor, "at least 1, and finite")
    low, high = rope.low_freq_factor, rope.high_freq_factor
    require(low < high, "rope.low_freq_factor", low, f"below rope.high_freq_factor ({high})")
