"""Reads the shape of a Llama model from the config.json of a Hugging Face folder.

Owns the translation into `LlamaConfig` and the list of what is understood. Refuses, by name, every
attribute that it neither handles nor knows to be without effect: a model that would be computed
differently from the reference must not load. Sampling settings in generation_config.json are not
read (a request says how it is sampled), its EOS ids are; BOS is the tokenizer's. Imports no jax.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from apex_jax.config import ConfigError, LlamaConfig
from apex_jax.models.hf_rope import read_rope
from apex_jax.models.json_fields import Fields

_DTYPES = ("float32", "bfloat16", "float16")

# Read below, or in hf_rope.
_HANDLED = frozenset(
    """
    architectures dtype eos_token_id head_dim hidden_size intermediate_size
    max_position_embeddings model_type num_attention_heads num_hidden_layers num_key_value_heads
    partial_rotary_factor rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings
    torch_dtype vocab_size
    """.split()  # noqa: SIM905 (as a list it would take a line per word)
)
# Without effect on the logits of a whole model at inference, whatever the value (checked against
# modeling_llama.py of transformers 5.23). `pretraining_tp` cuts matrices into slices whose products
# are summed again: the same function in another order. `max_sequence_length` and `is_llama_config`
# are what converters of older checkpoints noted.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled
    _name_or_path attention_dropout bos_token_id chunk_size_feed_forward id2label initializer_range
    is_decoder is_llama_config label2id max_sequence_length name_or_path output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type return_dict sep_token_id
    task_specific_params tokenizer_class torchscript transformers_version unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)
# Of generate() in transformers, which old config.json files hold: here a request says such things.
_GENERATION = frozenset(
    """
    do_sample max_length min_length num_beams output_scores repetition_penalty
    return_dict_in_generate temperature top_k top_p typical_p
    """.split()  # noqa: SIM905
)
# Would change the result, unless it has one of these values (null counts as absent).
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),  # pairs of neighbours instead of halves
    "tie_encoder_decoder": (False,),
    "use_sliding_window": (False,),
}


@dataclass(frozen=True)
class ModelFolder:
    """What the JSON files of a model folder say.

    eos_token_ids: the union of config.json's and generation_config.json's; may be empty.
    dtype: of the checkpoint as published: float32, bfloat16, float16 or None where it does not say.
    """

    path: Path
    architecture: LlamaConfig
    eos_token_ids: frozenset[int]
    dtype: str | None


def read_model_folder(path: str | Path, expected: LlamaConfig | None = None) -> ModelFolder:
    """Read and check config.json, and generation_config.json where there is one.

    expected: the architecture that the settings name, if they do; the folder's must equal it.

    Raises ConfigError naming the file, the attribute and its value, for a folder or a file that is
    missing or malformed, for an attribute that is missing, of a wrong type or not supported, for
    heads that do not fit together, and for a difference from `expected`.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"--config.model.path is {str(path)!r}; there is no such folder")
    fields = Fields(folder / "config.json", _read_json(folder / "config.json"))
    _check_family(fields)
    _check_attributes(fields)
    architecture = _read_architecture(fields)
    generation_path = folder / "generation_config.json"
    generation_values = _read_json(generation_path) if generation_path.exists() else {}
    generation = Fields(generation_path, generation_values)
    if expected is not None:
        _check_expected(fields.path, architecture, expected)
    eos_token_ids = [_token_ids(one, "eos_token_id", architecture) for one in (fields, generation)]
    return ModelFolder(
        path=folder,
        architecture=architecture,
        eos_token_ids=frozenset[int]().union(*eos_token_ids),
        dtype=_read_dtype(fields),
    )


def _read_json(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a model folder needs it") from None
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}; it must hold a JSON object")
    return cast(dict[str, object], content)


def _check_family(fields: Fields) -> None:
    model_type = fields.text("model_type")
    if model_type != "llama":
        raise fields.error("model_type", model_type, "llama, the one family supported")
    architectures = fields.values.get("architectures")
    if architectures not in (None, ["LlamaForCausalLM"]):
        raise fields.error("architectures", architectures, '["LlamaForCausalLM"]')


def _check_attributes(fields: Fields) -> None:
    for name, value in fields.values.items():
        if name in _HANDLED | _HARMLESS | _GENERATION or value is None:
            continue
        if name not in _NEUTRAL:
            raise ConfigError(
                f"{fields.path}: {name} is {value!r}; this attribute is not supported, and to "
                "ignore it could change the model's output"
            )
        if value not in _NEUTRAL[name]:
            right = " or ".join(repr(right) for right in _NEUTRAL[name])
            raise fields.error(name, value, f"{right}: nothing else is supported")


def _read_architecture(fields: Fields) -> LlamaConfig:
    width, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})"
        )
    if fields.values.get("head_dim") is None and width % num_heads:
        raise fields.error(
            "num_attention_heads",
            num_heads,
            f"a divisor of hidden_size ({width}) where head_dim is absent",
        )
    head_dim = fields.count("head_dim", width // num_heads)
    if head_dim % 2:
        raise fields.error("head_dim", head_dim, "even: RoPE rotates pairs")
    return LlamaConfig(
        num_layers=fields.count("num_hidden_layers"),
        d_model=width,
        d_ffn=fields.count("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=fields.count("vocab_size"),
        max_position_embeddings=fields.count("max_position_embeddings"),
        rms_norm_eps=fields.positive("rms_norm_eps"),
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        rope=read_rope(fields),
    )


def _token_ids(fields: Fields, name: str, architecture: LlamaConfig) -> frozenset[int]:
    value = fields.values.get(name)
    ids = cast(list[object], value) if isinstance(value, list) else [value]
    found: set[int] = set()
    for token_id in ids if value is not None else []:
        right = f"null, an id below vocab_size ({architecture.vocab_size}) or a list of such"
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise fields.error(name, value, right)
        if not 0 <= token_id < architecture.vocab_size:
            raise fields.error(name, value, right)
        found.add(token_id)
    return frozenset(found)


def _read_dtype(fields: Fields) -> str | None:
    name = "torch_dtype" if fields.values.get("dtype") is None else "dtype"
    dtype = fields.text(name, None)
    if dtype is not None and dtype not in _DTYPES:
        raise fields.error(name, dtype, "one of " + ", ".join(_DTYPES))
    return dtype


def _check_expected(path: Path, found: LlamaConfig, expected: LlamaConfig) -> None:
    for prefix, is_part, right_part in (
        ("", found, expected),
        ("rope.", found.rope, expected.rope),
    ):
        for name in (field.name for field in dataclasses.fields(is_part)):
            is_value, right = getattr(is_part, name), getattr(right_part, name)
            if name != "rope" and is_value != right:
                raise ConfigError(
                    f"--config.model.architecture.{prefix}{name} is {right!r}, but {path} says "
                    f"{is_value!r}; --config.model.architecture=none takes the file's"
                )
