"""Writing a file as a whole."""

import os
import secrets
from pathlib import Path


def replace(path: Path, content: bytes | memoryview) -> None:
    """Writes a file, of which a reader sees what was there before or all of the new.

    Raises:
        OSError: it cannot be written; what was there before remains.
    """
    # A name of its own, as another process may be writing the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
