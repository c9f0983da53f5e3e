"""How long a rank waits before its next try. Pure."""

from __future__ import annotations

from epdctl.topology.plan import RestartPolicy

__all__ = ["delay"]

_DOUBLINGS = 64  # beyond this every sane maximum is reached, and a float power would overflow


def delay(policy: RestartPolicy, attempt: int, jitter: float) -> float:
    """Seconds before restart number ``attempt`` (1 is the first); ``jitter`` is drawn by the caller from [-1, 1]."""
    doubled = policy.initial * 2.0 ** min(attempt - 1, _DOUBLINGS)
    return min(policy.maximum, doubled) * (1.0 + policy.jitter * jitter)
