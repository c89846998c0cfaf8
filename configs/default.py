"""Any Llama model: its folder, --config.model.path=FOLDER, says what it is."""

from apex_jax.config import Config


def get_config() -> Config:
    """Return the defaults of every setting."""
    return Config()
