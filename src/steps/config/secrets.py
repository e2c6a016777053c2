"""Which names stand for secrets: values under them are passed on in memory, and neither written nor shown."""

from __future__ import annotations

import re

# A name is secret when its last word says so: HF_TOKEN and DB_PASSWORD, not TOKENIZERS_PARALLELISM or PER_TOKEN_LOSS.
_SECRET_WORDS = frozenset(
    {"token", "tokens", "secret", "password", "passwd", "pass", "pwd", "passphrase", "key", "apikey", "pat", "auth"}
    | {"credential", "credentials"}
)
_SECRET_PARTS = re.compile(r"(?:^|_)(?:secrets?|password|(?:api|access|private|ssh|license|account)_key)(?:_|$)")
# In a configuration `pad_token` and `key` are everyday words.
_SECRET_TOKENS = re.compile(r"(?:^|_)(?:hf|hub|auth|access|api|bearer|wandb|ngc|github)_token$")


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    lowered = name.lower()
    return lowered.rpartition("_")[2] in _SECRET_WORDS or bool(_SECRET_PARTS.search(lowered))


def is_secret_key(name: str) -> bool:
    """Whether a configuration key of this name (its last part) holds a secret."""
    lowered = name.lower()
    return bool(_SECRET_PARTS.search(lowered) or _SECRET_TOKENS.search(lowered))
