"""Train the small Llama that ships in configs/demo_model, from text every Python carries.

    python -m launch.train_demo_model --output=runs/demo_model

Owns a byte-level BPE tokenizer, the training loop and the export to a Hugging Face folder; the text
is demo_corpus.py's. Needs optax (pip install '.[train]'), no download and no accelerator. The last
lines it prints are the losses on documents it never trained on, and samples.
"""

import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.flax
import tokenizers
from absl import app, flags
from flax import nnx
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from apex_jax.config import LlamaConfig
from apex_jax.models.llama import Llama
from launch.demo_corpus import collect_documents

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1  # the trainer numbers special tokens first
HELD_OUT_EVERY = 50  # every 50th document (2 %) is never trained on
# (share of the steps, rows, tokens a row): short windows are the cheapest per token; the last two
# phases teach the distances the first one cannot show.
PHASES = ((0.88, 4, 256), (0.10, 1, 1024), (0.02, 1, 2048))
SAMPLE_PROMPTS = (
    "json.load(",
    "class threading.Semaphore\n\n",
    "The built-in function",
    "Return a copy of the string",
)
# Llama 3's pattern: words keep their leading space, digits split in threes, newlines end a piece.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ARCHITECTURE = LlamaConfig(
    num_layers=4,
    d_model=256,
    d_ffn=704,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=4096,
    max_position_embeddings=2048,
    tie_embeddings=True,
)


def train_tokenizer(documents: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE in the form of Llama 3's: nothing is unknown, BOS is prepended."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def pack(tokenizer: tokenizers.Tokenizer, documents: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return all documents as one stream "BOS text EOS BOS ..." and where each one starts."""
    rows = [[*encoding.ids, EOS_ID] for encoding in tokenizer.encode_batch(documents)]
    starts = np.cumsum([0, *map(len, rows[:-1])])
    return np.concatenate(rows).astype(np.int32), starts


def draw_windows(
    rng: np.random.Generator, stream: np.ndarray, starts: np.ndarray, rows: int, length: int
) -> jax.Array:
    """Return [rows, length + 1] tokens; half of the windows start with a document."""
    last = len(stream) - length - 1
    anywhere = rng.integers(0, last, size=rows)
    documents = rng.choice(starts[starts < last], size=rows)
    offsets = np.where(rng.random(rows) < 0.5, documents, anywhere)
    return jnp.asarray(stream[offsets[:, None] + np.arange(length + 1)])


def mean_loss(model: Llama, tokens_bt: jax.Array) -> jax.Array:
    """Return the mean cross entropy, in nats per token, of each token after those before it."""
    logits = model(tokens_bt[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_bt[:, 1:]).mean()


evaluate_row = nnx.jit(mean_loss)


@nnx.jit
def train_step(model: Llama, optimizer: nnx.Optimizer[Llama], tokens_bt: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(mean_loss)(model, tokens_bt)
    optimizer.update(model, gradients)
    return loss


def held_out_loss(model: Llama, stream: np.ndarray, length: int) -> float:
    """Return nats per token over the stream, cut into windows of `length` (the rest is dropped)."""
    offsets = range(0, len(stream) - length, length)
    windows = [jnp.asarray(stream[None, o : o + length + 1]) for o in offsets]
    losses = [evaluate_row(model, tokens_bt) for tokens_bt in windows]
    return float(np.mean(losses))


@nnx.jit
def next_token(model: Llama, tokens_bt: jax.Array, last: jax.Array) -> jax.Array:
    return jnp.argmax(model(tokens_bt)[0, last])


def continue_greedily(
    model: Llama, tokenizer: tokenizers.Tokenizer, prompt: str, max_tokens: int = 48
) -> str:
    """Return the greedy continuation, by the dense forward pass over a padded row."""
    tokens = tokenizer.encode(prompt).ids
    num_prompt_tokens = len(tokens)
    while len(tokens) < num_prompt_tokens + max_tokens and tokens[-1] != EOS_ID:
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(next_token(model, jnp.asarray(padded), jnp.asarray(len(tokens) - 1))))
    return tokenizer.decode(tokens[num_prompt_tokens:])


def hugging_face_tensors(model: Llama) -> dict[str, jax.Array]:
    """Return the weights in bfloat16 under their Hugging Face names, fused matrices split."""
    c = model.config
    tensors = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm.scale}
    for index, layer in enumerate(model.layers):
        num_q, num_kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        q, k, v = jnp.split(layer.qkv_proj.weight[...], [num_q, num_q + num_kv])
        gate, up = jnp.split(layer.gate_up_proj.weight[...], 2)
        named = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.o_proj.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down_proj.weight,
            "input_layernorm": layer.input_norm.scale,
            "post_attention_layernorm": layer.post_norm.scale,
        }
        tensors |= {f"model.layers.{index}.{name}.weight": named[name] for name in named}
    return {name: jnp.asarray(value[...], jnp.bfloat16) for name, value in tensors.items()}


def export(model: Llama, tokenizer: tokenizers.Tokenizer, folder: pathlib.Path) -> None:
    """Write the model and its tokenizer as a Hugging Face folder."""
    c = model.config
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **ids,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.d_model,
        "initializer_range": 0.02,
        "intermediate_size": c.d_ffn,
        "max_position_embeddings": c.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": c.rope.theta,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    tokenizer_config = {
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": c.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", config),
        ("generation_config.json", ids | {"do_sample": False}),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = hugging_face_tensors(model)
    weights = safetensors.flax.save(tensors, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)


def new_model() -> Llama:
    model = Llama(ARCHITECTURE, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(flags.FLAGS.seed))
    for layer in model.layers:  # so that the residual stream starts as the embedding alone
        for linear in (layer.o_proj, layer.down_proj):
            linear.weight[...] = jnp.zeros_like(linear.weight[...])
    return model


def new_optimizer(model: Llama, num_steps: int) -> nnx.Optimizer[Llama]:
    warmup_steps = min(100, num_steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, flags.FLAGS.learning_rate, warmup_steps, num_steps
    )
    transform = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.95,
            weight_decay=0.1,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),  # matrices, not norms
        ),
    )
    return nnx.Optimizer(model, transform, wrt=nnx.Param)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    documents = collect_documents()
    training = [text for index, text in enumerate(documents) if index % HELD_OUT_EVERY]
    tokenizer = train_tokenizer(training, ARCHITECTURE.vocab_size)
    stream, starts = pack(tokenizer, training)
    held_out, _ = pack(tokenizer, documents[::HELD_OUT_EVERY])
    print(
        f"{len(documents)} documents of Python {platform.python_version()}: {len(stream)} tokens "
        f"to train on, {len(held_out)} held out",
        flush=True,
    )

    shapes = [shape for share, *shape in PHASES for _ in range(round(share * flags.FLAGS.steps))]
    model, folder = new_model(), pathlib.Path(flags.FLAGS.output)
    optimizer = new_optimizer(model, len(shapes))
    rng = np.random.default_rng(flags.FLAGS.seed)
    started_sec, losses = time.monotonic(), []
    for step, (rows, length) in enumerate(shapes, start=1):
        losses.append(train_step(model, optimizer, draw_windows(rng, stream, starts, rows, length)))
        if step % 100 == 0:
            print(
                f"step {step}/{len(shapes)} ({rows} x {length} tokens): training loss "
                f"{np.mean(losses[-100:]):.3f}, {time.monotonic() - started_sec:.0f} s",
                flush=True,
            )
        if step % flags.FLAGS.export_every == 0:
            export(model, tokenizer, folder)
            print(f"held-out loss {held_out_loss(model, held_out, 256):.3f}; saved to {folder}")

    # The shipped weights are bfloat16, so that is what the reported losses are of.
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), nnx.state(model))
    nnx.update(model, rounded)
    export(model, tokenizer, folder)
    for length in (256, 1024, 2048):
        loss = held_out_loss(model, held_out, length)
        print(f"held-out loss in windows of {length} tokens: {loss:.3f} nats a token")
    for prompt in SAMPLE_PROMPTS:
        print(f"--- {prompt!r} continues:\n{continue_greedily(model, tokenizer, prompt)}")


if __name__ == "__main__":
    # Only here: other scripts have flags of the same names, and tests import several of them.
    flags.DEFINE_string("output", "runs/demo_model", "Folder to write the model to.")
    flags.DEFINE_integer("steps", 4000, "Optimizer steps of 1024 or 2048 tokens.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 2e-3, "Peak of the cosine schedule.")
    flags.DEFINE_integer("export_every", 500, "Steps between evaluations and exports.")
    flags.DEFINE_integer("seed", 0, "Seed of the initial weights and of the windows.")
    app.run(main)
