"""Every mistake: its place, what is wrong, what would be right. ``«`` marks where the error has to point."""

from __future__ import annotations

from pathlib import Path

import pytest

from epdctl.errors import Mistake, TopologyError
from tests.unit.topology.support import load, loads

LANGUAGE = "model: {path: x}\nstages: {language: {}}\n"
ENCODER = "model: {path: x}\nstages:\n  language: {}\n  encoder: "
ENVIRON = {"PORT": "8001", "EMPTY": "", "WORD": "many"}


def mistakes_of(text: str) -> tuple[Mistake, ...]:
    with pytest.raises(TopologyError) as caught:
        loads("t.yaml", text, ENVIRON)
    return caught.value.mistakes


def only_mistake(marked: str) -> tuple[Mistake, str]:
    """The one mistake of a text with one «, and the place of that «."""
    before = marked[: marked.index("«")]
    place = f"t.yaml:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
    mistakes = mistakes_of(marked.replace("«", ""))
    assert len(mistakes) == 1, "\n".join(map(str, mistakes))
    return mistakes[0], place


MISTAKES = [
    (
        "more ranks than a machine holds",
        "model: {path: x}\nstages: «{language: {replicas: 1024, dp: 1024}}",
        "stages",
        "1048576 ranks; one machine is given at most 1024",
        "fewer replicas or dp",
    ),
    # keys
    ("typo in a key", LANGUAGE + "«limts: {}", "limts", "unknown key 'limts'", "did you mean 'limits'?"),
    ("typo deep down", LANGUAGE + "limits:\n  «max_medias: 3", "limits.max_medias", "unknown key", "'max_media'?"),
    ("foreign key", LANGUAGE + "«zzz: 1", "zzz", "unknown key 'zzz'", "known here: schema, cluster, model"),
    (
        "typo in a stage",
        "model: {path: x}\nstages:\n  «langage: {}",
        "stages.langage",
        "unknown key 'langage'",
        "did you mean 'language'?",
    ),
    ("duplicate key", LANGUAGE + "limits:\n  queue: 1\n  «queue: 2", "limits.queue", "in line 4", "keep one"),
    ("a number as key", LANGUAGE + "limits:\n  «1: 2", "limits", "a key should be a word, found 1", "name: value"),
    ("no model", "«stages: {language: {}}", "model", "is missing", "add model: {path:"),
    ("no path", "«model: {name: x}\nstages: {language: {}}", "model.path", "is missing", "add path:"),
    # types
    (
        "text for integer",
        'model: {path: x}\nstages: {language: {replicas: «"2"}}',
        "stages.language.replicas",
        "should be an integer, found the text '2'",
        "write 2 without quotes",
    ),
    (
        "bool for integer",
        "model: {path: x}\nstages: {language: {dp: «true}}",
        "stages.language.dp",
        "should be an integer, found true",
        None,
    ),
    ("float for integer", LANGUAGE + "limits: {queue: «2.0}", "limits.queue", "should be an integer, found 2.0", "2"),
    ("yes is text", LANGUAGE + "gateway: {port: «yes}", "gateway.port", "found the text 'yes'", None),
    ("octal is text", LANGUAGE + "gateway: {port: «010}", "gateway.port", "found the text '010'", None),
    (
        "number for text",
        "model: {path: x, name: «7}\nstages: {language: {}}",
        "model.name",
        "should be text, found 7",
        'write "7" in quotes',
    ),
    ("list for mapping", "model: {path: x}\nstages: «[a]", "stages", "should be a mapping, found [the text 'a']", None),
    ("model as text", "model: «./m\nstages: {language: {}}", "model", "should be a mapping", "model: {path: ./m}"),
    ("null for integer", LANGUAGE + "gateway:\n  port:«", "gateway.port", "found nothing", None),
    # words and bounds
    (
        "wrong word",
        "model: {path: x, dtype: «bfloat61}\nstages: {language: {}}",
        "model.dtype",
        "should be 'auto', 'float32', 'bfloat16' or 'float16', found the text 'bfloat61'",
        "did you mean 'bfloat16'?",
    ),
    ("wrong mode", LANGUAGE + "restart: {mode: «on-fail}", "restart.mode", "found the text 'on-fail'", "'on-failure'?"),
    ("other adapter", LANGUAGE + "adapter: «sglang", "adapter", "should be 'native', found the text 'sglang'", None),
    ("newer schema", LANGUAGE + "schema: «2", "schema", "should be 1, found 2", "write 1"),
    ("port too high", LANGUAGE + "gateway: {port: «70000}", "gateway.port", "at most 65535, found 70000", None),
    ("port zero", LANGUAGE + "gateway: {port: «0}", "gateway.port", "should be at least 1, found 0", None),
    (
        "no replicas",
        "model: {path: x}\nstages: {language: {replicas: «0}}",
        "stages.language.replicas",
        "should be at least 1, found 0",
        None,
    ),
    (
        "share above one",
        "model: {path: x}\nstages: {language: {share: «1.5}}",
        "stages.language.share",
        "should be at most 1, found 1.5",
        None,
    ),
    ("empty path", 'model: {path: «""}\nstages: {language: {}}', "model.path", "should not be empty", None),
    (
        "cluster's name",
        LANGUAGE + "cluster: «My_Cluster!",
        "cluster",
        "found the text 'My_Cluster!'",
        "up to 32 of a-z",
    ),
    # sizes and durations
    ("a bad size", LANGUAGE + "limits: {media_bytes: «64 megs}", "limits.media_bytes", "should be a size", "64MiB"),
    ("size as bool", LANGUAGE + "limits: {media_bytes: «true}", "limits.media_bytes", "found true", "64MiB"),
    ("no bytes", LANGUAGE + "limits: {media_bytes: «0B}", "limits.media_bytes", "should be at least 1", None),
    ("a bad duration", LANGUAGE + "deadlines: {start: «soon}", "deadlines.start", "should be a duration", "5s, 2m"),
    ("no time at all", LANGUAGE + "deadlines: {kill: «0s}", "deadlines.kill", "should be above 0, found", None),
    (
        "a bare backend",
        LANGUAGE + "transfer: «shm",
        "transfer",
        "should be a mapping",
        "write transfer: {backend: shm}",
    ),
    # GPUs
    (
        "one GPU without a list",
        "model: {path: x}\nstages: {language: {gpus: «0}}",
        "stages.language.gpus",
        "should be auto, none or a list, found 0",
        "write [0]",
    ),
    (
        "an unknown word",
        "model: {path: x}\nstages: {language: {gpus: «cpu}}",
        "stages.language.gpus",
        "should be auto, none or a list of GPUs, found the text 'cpu'",
        "write auto, none",
    ),
    (
        "no GPU in the list",
        "model: {path: x}\nstages: {language: {gpus: «[]}}",
        "stages.language.gpus",
        "should name at least one GPU",
        "write auto, none",
    ),
    (
        "a wrong item",
        "model: {path: x}\nstages: {language: {replicas: 2, gpus: [0, «-1]}}",
        "stages.language.gpus[1]",
        "should name a GPU, found -1",
        "index as nvidia-smi shows it",
    ),
    (
        "more GPUs than ranks",
        "model: {path: x}\nstages: {language: {gpus: «[0, 1]}}",
        "stages.language.gpus",
        "2 GPUs for 1 rank (replicas × dp)",
        "list 1 GPU",
    ),
    (
        "one GPU for three without share",
        "model: {path: x}\nstages: {language: {dp: 3, gpus: «[0]}}",
        "stages.language.gpus",
        "one GPU for 3 ranks, which do not share",
        "add share: 0.33",
    ),
    (
        "shares of one stage too large",
        "model: {path: x}\nstages: {language: {dp: 3, gpus: [0], share: «0.5}}",
        "stages.language.share",
        "3 ranks with share 0.5 need 1.5 of one GPU",
        "share: 0.33 or less",
    ),
    (
        "listed twice",
        "model: {path: x}\nstages: {language: {dp: 2, gpus: «[1, 1]}}",
        "stages.language.gpus",
        "GPU 1 is listed 2 times without share",
        "add share",
    ),
    (
        "share on the CPU",
        "model: {path: x}\nstages: {language: {gpus: none, share: «0.5}}",
        "stages.language.share",
        "gpus is none",
        "remove share",
    ),
    # stages that do not fit each other
    ("no stage", "model: {path: x}\nstages: «{}", "stages", "no stage is there", "add encoder, prefill and decode"),
    (
        "decode without prefill",
        "model: {path: x}\nstages: {decode: «{}}",
        "stages.decode",
        "decode without prefill",
        "add prefill: {}",
    ),
    (
        "prefill without decode",
        "model: {path: x}\nstages: {encoder: {}, prefill: «{}}",
        "stages.prefill",
        "prefill without decode",
        "add decode: {}",
    ),
    ("encoder alone", "model: {path: x}\nstages: {encoder: «{}}", "stages.encoder", "encoder alone", "or language"),
    (
        "language and prefill",
        "model: {path: x}\nstages: {prefill: {}, language: «{}}",
        "stages.language",
        "language beside prefill or decode",
        "keep language, or",
    ),
    (
        "mono and language",
        "model: {path: x}\nstages: {encoder: {}, language: {}, mono: «{}}",
        "stages.mono",
        "mono beside encoder and language",
        "keep mono, or",
    ),
    (
        "a backend for mono",
        "model: {path: x}\ntransfer: {backend: «zmq}\nstages: {mono: {}}",
        "transfer.backend",
        "a mono rank keeps its embeddings",
        "remove it",
    ),
    (
        "tensor parallel",
        "model: {path: x}\nstages: {language: {tp: «2}}",
        "stages.language.tp",
        "not served yet, found tp: 2",
        "write tp: 1",
    ),
    (
        "page sizes differ",
        "model: {path: x}\nstages: {prefill: {page_size: 8}, decode: {page_size: «16}}",
        "stages.decode.page_size",
        "pages of 16 tokens, but prefill writes pages of 8",
        "the same page_size",
    ),
    (
        "pool below a page",
        "model: {path: x}\nstages: {language: {kv_tokens: «8}}",
        "stages.language.kv_tokens",
        "less than one page of 16",
        "raise kv_tokens",
    ),
    (
        "pool below the context",
        "model: {path: x}\nstages: {language: {kv_tokens: «4096}}\nlimits: {max_context: 8192}",
        "stages.language.kv_tokens",
        "never holds a request of max_context 8192",
        "kv_tokens: 8192 or more",
    ),
    ("open to all", LANGUAGE + "gateway: {host: «0.0.0.0}", "gateway.host", "listen on every address", "127.0.0.1"),
    (
        "open to some",
        LANGUAGE + "gateway: {host: «10.0.0.5}",
        "gateway.host",
        "asks no key",
        "api_key: ${EPDCTL_API_KEY}",
    ),
    ("a short key", LANGUAGE + "gateway: {api_key: «short-key}", "gateway.api_key", "16 to 256", "openssl rand"),
    ("a wildcard", LANGUAGE + "gateway: {media_hosts: [«'*.example.com']}", "gateway.media_hosts[0]", "name", None),
    ("a host's name", LANGUAGE + "gateway: {host: «node7}", "gateway.host", "'node7' is not an IPv4", "127.0.0.1"),
    (
        "unhealthy too early",
        LANGUAGE + "deadlines: {unhealthy: «500ms}",
        "deadlines.unhealthy",
        "unhealthy after 0.5 s, but a heartbeat comes every 1 s",
        "several heartbeats",
    ),
    (
        "the encoder open to all",
        ENCODER + "{http: {port: 8100, host: «0.0.0.0}}",
        "stages.encoder.http.host",
        "listen on every address",
        "the one address",
    ),
    (
        "the encoder open to some",
        ENCODER + "{http: {port: 8100, host: «10.0.0.5}}",
        "stages.encoder.http.host",
        "no token is asked for",
        "add token_file",
    ),
    (
        "the encoder at the gateway's port",
        ENCODER + "{http: {port: «8000}}",
        "stages.encoder.http.port",
        "port 8000 is the gateway's too",
        "another port",
    ),
    (
        "a cache of no size",
        ENCODER + "{cache: «much}",
        "stages.encoder.cache",
        "should be a size",
        "64MiB",
    ),
    (
        "stuck before unhealthy",
        LANGUAGE + "deadlines: {stuck: «3s}",
        "deadlines.stuck",
        "stuck after 3 s, which is not later than unhealthy (5 s)",
        "above unhealthy",
    ),
    (
        "dead before unhealthy",
        LANGUAGE + "deadlines: {dead: «3s}",
        "deadlines.dead",
        "dead after 3 s, which is not later than unhealthy (5 s)",
        "dead above unhealthy",
    ),
    (
        "delays crossed",
        LANGUAGE + "restart: {initial: 10s, maximum: «5s}",
        "restart.maximum",
        "the longest delay, 5 s, is shorter than the first, 10 s",
        "at or above initial",
    ),
    (
        "revision of a directory",
        "model: {path: ./m, revision: «main}\nstages: {language: {}}",
        "model.revision",
        "revision 'main' of a local directory",
        "give a hub id",
    ),
    # references
    (
        "unset variable",
        "model:\n  path: a/«${NOPE}\nstages: {language: {}}",
        "model.path",
        "NOPE is not set",
        "${NOPE:-default}",
    ),
    ("asked-for variable", LANGUAGE + "cluster: «${NOPE:?name it: please}", "cluster", "name it: please", "set NOPE"),
    ("empty where asked for", LANGUAGE + "cluster: «${EMPTY:?say it}", "cluster", "say it", "set EMPTY"),
    ("reference without end", LANGUAGE + "cluster: «${NOPE", "cluster", "${ is never closed", "write ${VAR}"),
    ("reference without braces", LANGUAGE + "cluster: x«$WORD", "cluster", "$WORD is not a", "write ${WORD}, or $$"),
    ("reference of no form", LANGUAGE + "cluster: «${WORD-x}", "cluster", "${WORD-x} is not a", "${VAR:-default}"),
    ("a word for a number", LANGUAGE + "gateway: {port: «${WORD}}", "gateway.port", "found the text 'many'", None),
    ("a quoted number", LANGUAGE + 'gateway: {port: «"${PORT}"}', "gateway.port", "found the text '8001'", "8001 wi"),
    # YAML itself
    ("a tab", "model:\n«\tpath: x", "", "a tab", "YAML indents with spaces"),
    ("two documents", LANGUAGE + "«---\n" + LANGUAGE, "", "a second YAML document", "remove the ---"),
    ("a list at the top", "«- model", "", "the file holds a list", "write a mapping"),
    ("a word at the top", "«model", "", "the file holds a single value", "write a mapping"),
    ("nothing", "«", "", "the file is empty", "epdctl init"),
    ("only a comment", "«# later", "", "the file is empty", "epdctl init"),
    ("an open quote", LANGUAGE + 'cluster: "x«', "", "a quote that is never closed", "close the quote"),
    ("colon in a value", LANGUAGE + "cluster: a«: b", "", "a ': ' that YAML cannot place", "quote the value"),
    ("an alias of nothing", LANGUAGE + "limits: «*l", "", "an alias without its anchor", "define &name"),
    ("a tag", LANGUAGE + "cluster: «!!python/name:os.system x", "cluster", "the tag", "remove it"),
    ("an alias in its anchor", LANGUAGE + "x-a: «&a\n  b: [*a]\n", "", "nested", "alias"),
    ("merging a list", LANGUAGE + "limits:\n  <<: [«1]", "limits", "<< merges mappings only", "*name"),
    ("a private character", LANGUAGE + "cluster: «\ue000", "", "U+E000 is for private use", "remove it"),
    ("a control character", LANGUAGE + "cluster: «\x07", "", "U+0007 is not allowed", "remove it"),
]


@pytest.mark.parametrize(
    ("marked", "path", "problem", "remedy"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_one_mistake(marked: str, path: str, problem: str, remedy: str | None) -> None:
    mistake, place = only_mistake(marked)
    assert mistake.place == place
    assert mistake.path == path
    assert problem in mistake.problem
    assert (remedy is None) == (mistake.remedy is None)
    assert remedy is None or remedy in str(mistake.remedy)


def test_all_at_once_in_the_order_of_the_file() -> None:
    text = (
        "schema: 2\n"
        "modle: {path: x}\n"
        "stages:\n"
        "  encodr: {replicas: '2', gpsu: [0]}\n"
        "  decode: {tp: 2, kv_tokens: '${NOPE}'}\n"
        "limits: {queue: 1, queue: 2}\n"
        "gateway: {host: 0.0.0.0}\n"
    )
    assert [(mistake.place, mistake.path) for mistake in mistakes_of(text)] == [
        ("t.yaml:1:9", "schema"),
        ("t.yaml:2:1", "modle"),
        ("t.yaml:4:3", "stages.encodr"),
        ("t.yaml:4:22", "stages.encoder.replicas"),
        ("t.yaml:4:27", "stages.encoder.gpsu"),
        ("t.yaml:5:11", "stages.decode"),
        ("t.yaml:5:16", "stages.decode.tp"),
        ("t.yaml:5:31", "stages.decode.kv_tokens"),
        ("t.yaml:6:20", "limits.queue"),
        ("t.yaml:7:17", "gateway.host"),
    ]


def test_a_mended_value_brings_no_second_mistake() -> None:
    """With replicas dropped, two GPUs for one rank would look wrong; only the real mistake is told."""
    (mistake,) = mistakes_of("model: {path: x}\nstages: {language: {replicas: '2', gpus: [0, 1]}}")
    assert mistake.path == "stages.language.replicas"


def test_a_mistake_in_a_merged_anchor_points_at_the_anchor() -> None:
    (mistake,) = mistakes_of("model: {path: x}\nx-a: &a\n  replicas: no\nstages:\n  language:\n    <<: *a\n")
    assert (mistake.place, mistake.path) == ("t.yaml:3:13", "stages.language.replicas")


def test_aliases_that_explode_are_refused() -> None:
    lines = ["x-0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"x-{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (mistake,) = mistakes_of("\n".join(lines))
    assert "more than 20000 values" in mistake.problem


@pytest.mark.parametrize("opening", ["[", "{a: "])
def test_depth_without_end_is_refused(opening: str) -> None:
    (mistake,) = mistakes_of("a: " + opening * 5000)
    assert mistake.remedy


def test_the_message_is_what_a_terminal_makes_a_link_of() -> None:
    with pytest.raises(TopologyError) as caught:
        loads("t.yaml", LANGUAGE + "limts: {}", {})
    assert str(caught.value) == "t.yaml:3:1: limts: unknown key 'limts' (did you mean 'limits'?)"
    assert caught.value.exit_status == 2


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"none\.yaml: no such file \(epdctl init"):
        load(tmp_path / "none.yaml", {})


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"is a directory \(name the YAML file in it\)"):
        load(tmp_path, {})


def test_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"model:\n  path: caf\xe9\n")
    with pytest.raises(TopologyError) as caught:
        load(file, {})
    (mistake,) = caught.value.mistakes
    assert mistake.place == f"{file}:2:12"
    assert mistake.problem == "byte 0xe9 is not UTF-8"


def test_too_large_to_be_a_topology(tmp_path: Path) -> None:
    file = tmp_path / "weights.yaml"
    file.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(TopologyError, match="larger than 1 MiB"):
        load(file, {})
