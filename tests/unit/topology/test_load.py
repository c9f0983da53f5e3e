"""What a correct file means: defaults, references, anchors, sizes, names."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import msgspec
import pytest

from epdctl.topology.interpolation import UnresolvedError, mask, resolve
from epdctl.topology.plan import Deadlines, RestartPolicy
from epdctl.topology.schema import DeadlinesSection, LimitsSection, RestartSection, TopologyFile, json_schema
from epdctl.topology.values import parse_duration, parse_size
from epdctl.wire.config import Limits
from tests.unit.topology.support import load, loads

MINIMAL = "model: {path: x}\nstages: {language: {}}\n"


def file_of(text: str, environ: dict[str, str] | None = None) -> TopologyFile:
    return loads("t.yaml", text, environ or {}).file


def test_a_minimal_file_has_every_default() -> None:
    file = file_of(MINIMAL)
    assert [(stage.value, section.ranks) for stage, section in file.stages.present()] == [("language", 1)]
    assert (file.gateway.host, file.gateway.port) == ("127.0.0.1", 8000)


def test_an_empty_stage_is_a_stage() -> None:
    file = file_of("model: {path: x}\nstages:\n  encoder:\n  prefill:\n  decode:\n")
    assert [stage.value for stage, _ in file.stages.present()] == ["encoder", "prefill", "decode"]


@pytest.mark.parametrize("stages", ["{prefill: {}, decode: {}}", "{language: {}}", "{encoder: {}, language: {dp: 2}}"])
def test_combinations_that_are_served(stages: str) -> None:
    file_of(f"model: {{path: x}}\nstages: {stages}")


def test_sections_are_field_for_field_what_the_ranks_get() -> None:
    assert LimitsSection().model_dump() == msgspec.structs.asdict(Limits())
    assert RestartSection().model_dump() == asdict(RestartPolicy())
    assert DeadlinesSection().model_dump() == asdict(Deadlines())


REFERENCES = [
    ("${A}", "one"),
    ("x${A}y${A}", "xoneyone"),
    ("${A:-two}", "one"),
    ("${NONE:-two}", "two"),
    ("${EMPTY:-two}", "two"),
    ("${EMPTY}x", "x"),
    ("${NONE:-}x", "x"),
    ("${A:?say it}", "one"),
    ("$${A}", "${A}"),
    ("$$A costs 5$", "$A costs 5$"),
    ("${NONE:-a: b #c}", "a: b #c"),
    ("${ODD}", "a: [b] #c"),
]
ENVIRON = {"A": "one", "EMPTY": "", "ODD": "a: [b] #c", "PORT": "9000", "N": "2"}


@pytest.mark.parametrize(("written", "meant"), REFERENCES)
def test_references(written: str, meant: str) -> None:
    for path in (written, f'"{written}"', f"'{written}'"):
        assert file_of(f"model:\n  path: {path}\nstages: {{language: }}", ENVIRON).model.path == meant


def test_a_variable_is_typed_as_if_it_stood_there() -> None:
    file = file_of(
        "model: {path: x}\nstages: {language: {dp: ${N}, gpus: [${N}, 1]}}\ngateway: {port: ${PORT}}", ENVIRON
    )
    assert file.gateway.port == 9000
    assert file.stages.language is not None
    assert file.stages.language.gpus == (2, 1)
    assert file_of(MINIMAL + "gateway: {port: ${NONE:-8123}}").gateway.port == 8123


def test_references_in_comments_are_not_looked_up() -> None:
    file_of(MINIMAL + "# ${NONE:?never asked} $NONE ${\n")


def test_many_references_keep_their_numbers() -> None:
    text = "".join(f"${{V{number}}} " for number in range(6500))
    masked = mask(text)
    assert len(masked.text) == len(text)
    assert masked.unmask(masked.text, lambda reference: reference.text) == text


def test_resolve_says_what_is_missing() -> None:
    with pytest.raises(UnresolvedError, match="A is not set") as caught:
        resolve("${A}", {})
    assert caught.value.remedy == "set it in the environment, or write ${A:-default}"


def test_anchors_and_merges() -> None:
    file = file_of(
        "model: {path: x}\nx-half: &half {share: 0.5, dp: 2}\n"
        "stages:\n  prefill: {<<: *half, dp: 1}\n  decode:\n    <<: [*half, {kv_tokens: 99}]\n    kv_tokens: 64\n"
    )
    prefill, decode = file.stages.prefill, file.stages.decode
    assert prefill is not None
    assert decode is not None
    assert (prefill.share, prefill.dp) == (0.5, 1)
    assert (decode.share, decode.dp, decode.kv_tokens) == (0.5, 2, 64)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("7B", 7),
        ("64MiB", 64 << 20),
        ("64 mib", 64 << 20),
        ("1.5KiB", 1536),
        ("2GB", 2 * 10**9),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [(7, 7), (0.5, 0.5), ("500ms", 0.5), ("5s", 5), ("2m", 120), ("1.5h", 5400)]
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


def test_human_values_reach_the_model() -> None:
    file = file_of(MINIMAL + "limits: {max_body_bytes: 1MiB, request_seconds: 2m}\ntransfer: {embedding_pool: 1GiB}")
    assert (file.limits.max_body_bytes, file.limits.request_seconds) == (1 << 20, 120.0)
    assert file.transfer.embedding_pool == 1 << 30


@pytest.mark.parametrize(
    ("file", "cluster"),
    [
        ("epdctl.yaml", "default"),
        ("cpu-demo.yaml", "cpu-demo"),
        ("My Model (2).yaml", "my-model-2"),
        ("§.yaml", "default"),
        ("a" * 40 + ".yaml", "a" * 32),
    ],
)
def test_the_cluster_is_named_after_the_file(tmp_path: Path, file: str, cluster: str) -> None:
    (tmp_path / file).write_text(MINIMAL)
    assert load(tmp_path / file, {}).cluster == cluster


def test_the_cluster_can_be_named_in_the_file() -> None:
    assert loads("t.yaml", MINIMAL + "cluster: prod_1", {}).cluster == "prod_1"


def test_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load(file, {}).file.model.path == "x"


def test_every_field_of_the_schema_is_described_and_takes_a_reference() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert "^x-" in schema["patternProperties"]
    assert set(schema["properties"]) >= {"schema", "cluster", "model", "stages", "limits"}
    for name, section in schema["$defs"].items():
        for field, value in section.get("properties", {}).items():
            assert value.get("description"), f"{name}.{field}"
    port = schema["$defs"]["GatewaySection"]["properties"]["port"]
    assert {"$ref": "#/$defs/Reference"} in port["anyOf"]
    json.dumps(schema)


def test_planning_imports_nothing_heavy() -> None:
    """A fact about modules, in a process of its own: what is imported here was imported by others before."""
    code = (
        "import sys, epdctl.adapters, epdctl.topology.profiles\n"
        "heavy = {'torch', 'transformers', 'zmq', 'numpy', 'ray', 'fastapi', 'huggingface_hub', 'pynvml', 'psutil'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_plan_and_profiles_can_be_imported_without_pydantic() -> None:
    code = "import sys, epdctl.topology.plan, epdctl.topology.profiles; print({'pydantic', 'yaml'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
