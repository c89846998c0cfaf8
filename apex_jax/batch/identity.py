"""What makes two runs the same job: the model, the defaults, the tokenizer.

Owns the sidecar OUTPUT.job.json, which keeps that in plain text beside the output, so that a job
that may not resume can say what differs. Where the sidecar is lost, the hash in each line decides.
"""

import contextlib
import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apex_jax.batch.fields import is_object
from apex_jax.batch.journal import OutputError, replacing
from apex_jax.batch.lines import canonical_json
from apex_jax.batch.protocol import BatchModel
from apex_jax.config import Config, ConfigError
from apex_jax.models.model_files import fingerprint_of
from apex_jax.text.model_text import ModelText

FORMAT = 3  # of output lines; another one does not resume

Identity = Mapping[str, Any]


def known_before_loading(config: Config, text: ModelText) -> dict[str, Any]:
    """Return the part of the identity that needs no engine: a mismatch in it costs no loading.

    Of the model that leaves out a dtype that depends on the device, a shape that only its folder
    says, and the fingerprint of a folder without weights, which the engine will refuse.
    """
    template, model = text.chat_template, config.model
    known_of_model: dict[str, Any] = {"precision": model.precision}
    if model.dtype != "auto":
        known_of_model["dtype"] = model.dtype
    if model.architecture is not None:
        known_of_model["architecture"] = asdict(model.architecture)
    with contextlib.suppress(ConfigError):
        known_of_model["fingerprint"] = fingerprint_of(model)
    return {
        "format": FORMAT,
        "defaults": asdict(config.sampling),
        "tokenizer_sha256": None if text.tokenizer is None else text.tokenizer.sha256,
        "chat_template_sha256": None if template is None else template.sha256,
        "chat_time": None if template is None or template.time is None else str(template.time),
        "model": known_of_model,
    }


def identify(config: Config, text: ModelText, model: BatchModel) -> dict[str, Any]:
    """Return the whole identity. The model's name is not in it: a moved folder is the same job."""
    return {
        **known_before_loading(config, text),
        "model": {
            "fingerprint": model.fingerprint,
            "dtype": model.dtype,
            "precision": config.model.precision,
            "architecture": asdict(model.architecture),  # all there is to tell dummy models apart
        },
    }


def chat_time(output: Path) -> datetime.datetime | None:
    """Return the time that an existing output's chats were told, None where they were told none.

    A job that goes on tells it again: prompts would not be the same otherwise.
    """
    try:
        return datetime.datetime.fromisoformat((read_sidecar(output) or {})["chat_time"])
    except (KeyError, TypeError, ValueError):
        return None


def hash_identity(identity: Identity) -> str:
    """Return the hex sha256 that every output line carries as job_sha256."""
    return hashlib.sha256(canonical_json(identity)).hexdigest()


def differences(old: Identity, new: Identity) -> list[str]:
    """Name what `new` has otherwise than `old`, as `model.dtype was "float32", now "float16"`.

    What `new` does not have (not known yet) is no difference.
    """
    old_items, new_items = flatten(old), flatten(new)
    return [
        f"{name} was {json.dumps(old_items.get(name))}, now {json.dumps(value)}"
        for name, value in new_items.items()
        if name not in old_items or old_items[name] != value
    ]


def flatten(item: Identity, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in item.items():
        if is_object(value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def sidecar_path(output: Path) -> Path:
    return output.with_name(output.name + ".job.json")


def read_sidecar(output: Path) -> Identity | None:
    """Return the identity that the output was written under; None where it is lost or corrupt."""
    try:
        item = json.loads(sidecar_path(output).read_bytes())
    except (OSError, ValueError):
        return None
    return item if is_object(item) else None


def write_sidecar(output: Path, identity: Identity) -> None:
    """Write it in one atomic step. Raises OutputError."""
    path = sidecar_path(output)
    write_json(path, identity)


def write_json(path: Path, item: Mapping[str, Any]) -> None:
    """Write readable JSON in one atomic step. Raises OutputError naming the file."""
    try:
        with replacing(path) as file:
            file.write(json.dumps(item, indent=2, default=str).encode("ascii") + b"\n")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
