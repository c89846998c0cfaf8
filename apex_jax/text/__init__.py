"""Text to token ids and back: tokenizers, detokenisation, stop strings, chat templates."""
