"""What Mooncake's engine lets others do, so that nobody promises more than there is: the cluster's token guards our
messages, and not the engine.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

SECONDS = 60

RANK = """
import os, sys, torch
from epdctl.transfer.mooncake import MooncakeMover
mover = MooncakeMover("tcp", torch.device("cpu"))
pool = mover.allocate(4096, torch.device("cpu")).fill_(ord("."))
print("at", mover.locate("embeddings", pool).place, flush=True)
sys.stdin.readline()
print("has", bytes(pool[:16].tolist()).decode(), flush=True)
os._exit(0)
"""

STRANGER = """
import ctypes, os, sys
from mooncake.engine import TransferEngine
place = sys.argv[1]
engine = TransferEngine()
engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
address = engine.get_first_buffer_address(place)
read, written = ctypes.create_string_buffer(16), ctypes.create_string_buffer(b"by nobody we know")
assert engine.transfer_sync_read(place, ctypes.addressof(read), address, 16) == 0
assert engine.transfer_sync_write(place, ctypes.addressof(written), address, 9) == 0
print("read", read.value.decode(), flush=True)
os._exit(0)
"""


def test_whoever_reaches_the_engine_is_told_where_memory_is_and_reads_and_writes_it() -> None:
    """Without the token, and without any message to the rank: from another process, of whichever user."""
    pytest.importorskip("mooncake.engine", reason="Mooncake is an extra")
    rank = subprocess.Popen([sys.executable, "-c", RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert rank.stdin is not None
    assert rank.stdout is not None
    try:
        place = rank.stdout.readline().removeprefix("at ").strip()
        stranger = subprocess.run(
            [sys.executable, "-c", STRANGER, place], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert "read ................" in stranger.stdout, stranger.stderr
        told, _ = rank.communicate("\n", timeout=SECONDS)
        assert told == "has by nobody.......\n"
    finally:
        rank.kill()
        rank.communicate()
