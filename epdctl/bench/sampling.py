"""``python -m epdctl.bench.sampling``: what choosing tokens costs, by setting, beside greedy in the same run.

Logits of a vocabulary of Qwen's size, made up: ``peaked`` ones as models mostly give, where a hundred tokens share all
but a thousandth, and ``flat`` ones, where most of the vocabulary is within the cuts.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy
import torch

from epdctl.engine.sampler import draw
from epdctl.engine.settings import Ask
from epdctl.wire.message import to_json
from epdctl.wire.serve import Sampling

__all__ = ["SETTINGS", "Report", "Row", "measure"]

VOCABULARY = 152_064
TOKENS = 500  # of each sequence so far; the last hundred are its answer
HEAD = 100  # likely tokens of peaked logits
WARM = Sampling(temperature=1.0)
SETTINGS: Mapping[str, Sampling] = {
    "greedy": Sampling(),
    "temperature": WARM,
    "min_p": msgspec.structs.replace(WARM, min_p=0.05),
    "top_p": msgspec.structs.replace(WARM, top_p=0.95),
    "top_k": msgspec.structs.replace(WARM, top_k=20),
    "top_p and top_k": msgspec.structs.replace(WARM, top_p=0.8, top_k=20),
    "repetition_penalty": Sampling(repetition_penalty=1.1),
    "presence_penalty": Sampling(presence_penalty=1.0),
    "logprobs": Sampling(logprobs=5),
}


class Row(msgspec.Struct, frozen=True):
    """``ms``: of a step, per sequence. ``of_greedy``: how many times that of greedy over the same logits."""

    logits: str
    sequences: int
    setting: str
    ms: float
    of_greedy: float


class Report(msgspec.Struct, frozen=True):
    """On a CPU the clock counts this process's time alone, on a GPU all of it."""

    schema: int
    command: str
    device: str
    cpus: int
    threads: int
    vocabulary: int
    rounds: int
    versions: dict[str, str]
    rows: list[Row]


def peaked(rows: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    logits = 2.0 * torch.randn(rows, VOCABULARY, generator=noise)
    likely = torch.randint(0, VOCABULARY, (rows, HEAD), generator=noise)
    return logits.scatter(1, likely, (20.0 - 1.2 * torch.arange(1, HEAD + 1).log()).expand(rows, -1))


def flat(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(1))


LOGITS: Mapping[str, Callable[[int], torch.Tensor]] = {"peaked": peaked, "flat": flat}


def measure(sequences: list[int], rounds: int, device: torch.device, command: str) -> Report:
    return Report(
        schema=1,
        command=command,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        cpus=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        vocabulary=VOCABULARY,
        rounds=rounds,
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        rows=[row for name in LOGITS for count in sequences for row in _rows(name, count, rounds, device)],
    )


def _rows(name: str, count: int, rounds: int, device: torch.device) -> list[Row]:
    """In turns, so that what else the machine does falls on all settings alike."""
    logits = LOGITS[name](count).to(device)
    spent: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for turn in range(1 + rounds):
        for setting, sampling in SETTINGS.items():
            seconds = _timed(logits, sampling)
            if turn:  # the first is not like the others
                spent[setting].append(seconds)
    ms = {setting: 1000 * statistics.median(each) / count for setting, each in spent.items()}
    return [Row(name, count, each, round(ms[each], 4), round(ms[each] / ms["greedy"], 2)) for each in SETTINGS]


def _timed(logits: torch.Tensor, sampling: Sampling) -> float:
    tokens = [37 * place % VOCABULARY for place in range(TOKENS)]
    settings = msgspec.structs.replace(sampling, answer_from=TOKENS - 100)
    asks = [Ask(msgspec.structs.replace(settings, seed=row), tokens) for row in range(len(logits))]
    clock = time.process_time if logits.is_cpu else time.perf_counter
    began = clock()
    with torch.inference_mode():
        draw(logits, asks)
    return clock() - began


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m epdctl.bench.sampling", description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64], metavar="N", help="of a step")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON there")
    chosen = parser.parse_args()
    command = " ".join(["python -m epdctl.bench.sampling", *sys.argv[1:]])
    report = measure(chosen.sequences, chosen.rounds, torch.device(chosen.device), command)
    for row in report.rows:
        print(f"{row.logits:<7} {row.sequences:>4}  {row.setting:<20} {row.ms:>9.3f} ms {row.of_greedy:>8.2f}")
    if chosen.output is not None:
        chosen.output.write_bytes(to_json(report) + b"\n")


if __name__ == "__main__":
    main()
