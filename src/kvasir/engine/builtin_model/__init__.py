"""The small checkpoint that ships with the package, a plain Hugging Face directory (see docs/model-card.md)."""

from importlib.resources import files
from pathlib import Path


def path() -> Path:
    """The checkpoint directory; the package is installed as files, never run from a zip."""
    return Path(str(files(__name__)))
