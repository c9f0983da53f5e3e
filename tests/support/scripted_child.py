"""A process that does what its arguments say; standard library only, so that it is up in milliseconds.

Each process of its tree opens the FIFO ``--report``, writes ``ROLE PID`` and keeps it open: end of file there means
that the whole tree is gone. Without ``--exit`` they live until they are killed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--report", help="FIFO that every process of the tree writes to and holds open")
    parser.add_argument("--ignore-term", action="store_true", help="the whole tree ignores SIGTERM")
    parser.add_argument("--setsid-grandchild", action="count", default=0, help="once per level")
    parser.add_argument("--exit", type=int, help="end with this status once the tree stands")
    parser.add_argument("--spec-to", help="copy standard input, to its end, into this file")
    parser.add_argument("--env-to", help="write the environment into this file")
    return parser.parse_args()


def say(fd: int | None, role: str) -> None:
    if fd is not None:
        os.write(fd, f"{role} {os.getpid()}\n".encode())


def descend(fd: int | None, levels: int) -> None:
    """Leave ``levels`` generations behind, each in a session of its own; returns when all of them stand."""
    standing, stands = os.pipe()
    if os.fork() == 0:
        os.setsid()
        say(fd, f"level-{levels}")
        if levels > 1:
            descend(fd, levels - 1)
        os.write(stands, b".")
        sleep()
    os.read(standing, 1)


def sleep() -> None:
    while True:
        signal.pause()


def main() -> None:
    options = arguments()
    if options.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fd = os.open(options.report, os.O_WRONLY) if options.report else None
    if options.spec_to:
        with open(options.spec_to, "wb") as file:
            file.write(sys.stdin.buffer.read())
    if options.env_to:
        with open(options.env_to, "w") as file:
            file.write("\n".join(f"{key}={value}" for key, value in os.environ.items()))
    if options.setsid_grandchild:
        descend(fd, options.setsid_grandchild)
    say(fd, "rank")
    if options.exit is not None:
        os._exit(options.exit)
    sleep()


if __name__ == "__main__":
    main()
