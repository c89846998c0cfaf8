"""Convert a Hugging Face folder of safetensors into one whose weights are an Orbax checkpoint.

    python -m launch.convert_checkpoint --input=HF_FOLDER --output=FOLDER

The output has the same weights, bit for bit, already fused as the model wants them, and copies of
the configuration and tokenizer: it serves as --config.model.path. It appears only when complete.
Needs host memory for the model once. Exit status: 0 converted, 2 refused, nothing written.
"""

import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags

from apex_jax.config import ConfigError
from apex_jax.models import orbax_store, safetensors_store, weights
from apex_jax.models.hf_config import read_model_folder
from apex_jax.models.model_files import COMPANION_FILES, ORBAX_FOLDER, is_orbax

EXIT_REFUSED = 2


def convert(source: Path, output: Path) -> None:
    """Write `output`, which must not exist; ConfigError says why not, and leaves nothing behind."""
    folder = read_model_folder(source)
    if is_orbax(folder.path):
        raise ConfigError(f"--input is {str(source)!r}, which is an Orbax folder already")
    if output.exists():
        raise ConfigError(f"--output is {str(output)!r}, which exists; name a new folder")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output is {str(output)!r}, in a folder that does not exist")
    dtype = safetensors_store.stored_dtype(folder.path)
    _check_disk(output, folder.architecture.num_parameters * dtype.itemsize)
    cpu = jax.devices("cpu")[0]
    loaded = weights.load(folder.path, folder.architecture, dtype, cpu)
    # Beside the output, so that the rename stays on one disk.
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        orbax_store.save(partial / ORBAX_FOLDER, loaded)
        for name in COMPANION_FILES:
            if (folder.path / name).is_file():
                shutil.copyfile(folder.path / name, partial / name)
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def main(argv: Sequence[str]) -> int:
    """Convert what the flags name; return the exit status."""
    source, output = flags.FLAGS.input, flags.FLAGS.output
    if len(argv) > 1 or source is None or output is None:
        return _refuse("give --input=HF_FOLDER and --output=FOLDER, and nothing else")
    jax.config.update("jax_platforms", "cpu")  # a GPU has no part in it
    for library in ("jax", "absl", "orbax"):  # they tell what only their developers need
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        convert(Path(source).expanduser(), Path(output).expanduser())
    except (ConfigError, OSError) as error:
        return _refuse(str(error))
    print(f"converted; use it with --config.model.path={output}")
    return 0


def _check_disk(output: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(output.absolute().parent).free
    if free_bytes < num_bytes:
        raise ConfigError(
            f"--output is {str(output)!r}, where {free_bytes / 2**30:.1f} GiB are free; the "
            f"weights take {num_bytes / 2**30:.1f} GiB"
        )


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_REFUSED


if __name__ == "__main__":
    # Only here: other scripts have flags of the same names, and tests import several of them.
    flags.DEFINE_string("input", None, "Folder with config.json and safetensors.")
    flags.DEFINE_string("output", None, "Folder to create.")
    app.run(main)
