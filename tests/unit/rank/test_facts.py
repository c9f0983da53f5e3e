"""What a rank says of itself before it may exchange data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from epdctl.rank.facts import facts_of
from epdctl.rank.fingerprint import BLOCKS, fingerprint
from epdctl.wire.serve import KvLayout
from tests.support.ranks import make_spec

LAYOUT = KvLayout(page_size=16, layers=2, kv_heads=2, head_dim=8, dtype="float32")


def checkpoint(folder: Path, config: str = "{}", preprocessing: str = "{}", changed: str = "") -> Path:
    """Three tensors of 40 KB, in two files, of rubbish; ``changed``: the one that was trained on."""
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "preprocessor_config.json").write_text(preprocessing)
    (folder / "README.md").write_text(str(folder))
    made = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(0))
    tensors = {name: tensor + 0.01 * (name == changed) for name, tensor in zip("abc", made, strict=True)}
    save_file({name: tensors[name] for name in "ab"}, folder / "model-1.safetensors")
    save_file({"c": tensors["c"]}, folder / "model-2.safetensors", {"format": "pt"})
    return folder


def test_the_fingerprint_is_of_settings_and_weights_and_of_nothing_else(tmp_path: Path) -> None:
    one = fingerprint(checkpoint(tmp_path / "one"))
    assert fingerprint(checkpoint(tmp_path / "two")) == one
    assert fingerprint(checkpoint(tmp_path / "three", config="{ }")) != one
    assert fingerprint(tmp_path / "nowhere") is None


def test_two_models_of_one_shape_are_told_apart(tmp_path: Path) -> None:
    """The same settings, and files of the same names and sizes; one trained on by a tensor."""
    prints = [fingerprint(checkpoint(tmp_path / "plain"))]
    prints += [fingerprint(checkpoint(tmp_path / name, changed=name)) for name in "abc"]
    assert len(set(prints)) == 4


def test_other_preprocessing_is_another_model(tmp_path: Path) -> None:
    """What the pixels become is said in a file of its own."""
    texts = ['{"max_pixels": 1000}', '{"max_pixels": 2000}']
    one, other = (fingerprint(checkpoint(tmp_path / text[-5:-1], preprocessing=text)) for text in texts)
    assert one != other


def test_a_large_checkpoint_costs_no_more_than_a_few_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, many = 1 << 20, 5000
    tensors = {
        str(n): {"dtype": "U8", "shape": [size], "data_offsets": [n * size, (n + 1) * size]} for n in range(many)
    }
    header = json.dumps(tensors).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + many * size)  # 5 GB, all of it holes
    read = list[int]()
    pread = os.pread

    def noting(fd: int, nbytes: int, offset: int) -> bytes:
        read.append(offset)
        return pread(fd, nbytes, offset)

    monkeypatch.setattr(os, "pread", noting)
    assert fingerprint(tmp_path)
    assert 512 <= len(read) <= BLOCKS
    assert max(read) > (many - 10) * size, "to the end"


def test_a_file_that_is_no_checkpoint_counts_by_its_beginning(tmp_path: Path) -> None:
    prints = set()
    for text in (b"", b"short", b"a longer one", b"a longer 1!!", (12).to_bytes(8, "little") + b"no JSON here"):
        (tmp_path / "model.safetensors").write_bytes(text)
        prints.add(fingerprint(tmp_path))
    assert len(prints) == 5


def test_pages_are_told_by_those_that_exchange_them(sockets: Path) -> None:
    config = make_spec("prefill/0", sockets).config
    assert facts_of(config, width=64).kv_pages is None
    assert facts_of(config, width=64, layout=LAYOUT).kv_pages == "16 tokens x 2 layers x 2 heads x 8 of float32"
    assert (facts_of(config, width=64).width, facts_of(config, width=64).transport) == (64, "zmq")
