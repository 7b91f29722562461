"""One SQLite file with a daemon's runs, units and events, opened right every time."""

from .db import DB
from .errors import OpenError, SchemaError

__all__ = ["DB", "OpenError", "SchemaError", "__version__"]

__version__ = "0.3.0"
