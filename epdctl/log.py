"""One format of log lines for every process: time, level, logger, text; to stderr, which the supervisor keeps."""

from __future__ import annotations

import logging
import os
import sys

__all__ = ["setup"]


def setup() -> None:
    """Level from EPDCTL_LOG (debug, info, warning, error); info by default."""
    level = os.environ.get("EPDCTL_LOG", "info").upper()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level if level in logging.getLevelNamesMapping() else "INFO")
