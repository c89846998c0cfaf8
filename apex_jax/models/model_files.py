"""Knows which files make up a model folder, in what format its weights are, and what identifies it.

Reads no tensor. Called by the loaders, the converter and the journal of a job. Imports no jax.
"""

import hashlib
from pathlib import Path

from apex_jax.config import ConfigError, ModelConfig

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
ORBAX_FOLDER = "orbax"
# What a model folder holds beside its weights, where it has it.
COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

# A fine-tuned model has the same headers and sizes, but hardly a block of equal weights. 64 blocks
# a file read in milliseconds, against minutes for all of it.
_BLOCK_BYTES = 4096
_NUM_BLOCKS = 64
_HEAD_BYTES = 1 << 20  # JSON files whole, and the header of any safetensors file known


def is_orbax(folder: Path) -> bool:
    """Tell an Orbax model folder from one of safetensors; ConfigError for neither or both."""
    has_orbax = (folder / ORBAX_FOLDER).is_dir()
    has_safetensors = any(
        (folder / name).exists() for name in (SAFETENSORS_FILE, SAFETENSORS_INDEX)
    )
    if has_orbax and has_safetensors:
        raise ConfigError(f"{folder} holds weights twice, as safetensors and in {ORBAX_FOLDER}/")
    if not has_orbax and not has_safetensors:
        raise ConfigError(
            f"{folder} holds no weights: neither {SAFETENSORS_FILE} nor {SAFETENSORS_INDEX} nor "
            f"{ORBAX_FOLDER}/ is there (pickled .bin files are not read; save them as safetensors)"
        )
    return has_orbax


def fingerprint_of(model: ModelConfig) -> str:
    """Return what changes with the weights that the settings ask for. Raises as `fingerprint`."""
    if model.weights == "dummy" or not model.path:
        return f"dummy-{model.seed}"
    return fingerprint(Path(model.path).expanduser())


def fingerprint(folder: Path) -> str:
    """Return 16 hex digits that change with the model's weights, configuration or tokenizer.

    Covers names, sizes, small files whole and samples of large ones, so it takes milliseconds. The
    same files have the same fingerprint wherever they lie; a converted copy has another.
    """
    digest = hashlib.sha256()
    weights = folder.glob(f"{ORBAX_FOLDER}/**/*") if is_orbax(folder) else folder.glob("*.safe*")
    companions = [folder / name for name in COMPANION_FILES]
    for path in sorted({*weights, *companions}):
        if path.is_file():
            name, size = path.relative_to(folder).as_posix(), path.stat().st_size
            digest.update(f"{name}\0{size}\0".encode())
            _add_samples(digest, path, size)
    return digest.hexdigest()[:16]


def _add_samples(digest: "hashlib._Hash", path: Path, size_bytes: int) -> None:
    with path.open("rb") as file:
        digest.update(file.read(_HEAD_BYTES))
        if size_bytes > _HEAD_BYTES:
            for block in range(1, _NUM_BLOCKS + 1):
                file.seek(max(size_bytes - _BLOCK_BYTES, 0) * block // _NUM_BLOCKS)
                digest.update(file.read(_BLOCK_BYTES))
