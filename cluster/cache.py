"""Where this machine keeps what can be fetched or computed again. In: `RAYFT_CACHE`. Out: a directory path."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$RAYFT_CACHE`, or `~/.cache/rayft`; not created here."""
    given = os.environ.get("RAYFT_CACHE")
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "rayft"
