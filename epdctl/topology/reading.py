"""File → text → nodes → a Document. Finds what is wrong with the YAML itself and goes on as far as it can."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from epdctl.errors import Mistake, TopologyError
from epdctl.topology.document import Document, Place, Trail
from epdctl.topology.interpolation import RESERVED, Masked, Reference, UnresolvedError, mask, place_of, resolve

__all__ = ["MAX_FILE_BYTES", "Parsed", "parse", "read_text"]

MAX_FILE_BYTES = 1 << 20
MAX_NODES = 20_000  # after aliases are expanded: a few lines of YAML can ask for billions
MAX_DEPTH = 32

_PLAIN, _IMPLIED = "plain", "implied"  # a scalar without quotes, everything else without a tag
_SCALARS: tuple[tuple[re.Pattern[str], Callable[[str], object]], ...] = (  # YAML 1.2: no, on and 010 are text
    (re.compile(r"(~|null|Null|NULL)?"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?(0|[1-9][0-9]{0,300})"), int),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"), float),
)
_ADVICE = (  # part of PyYAML's words, ours, and the remedy; the first that fits
    (r"found character '\t'", "a tab", "YAML indents with spaces"),
    ("but found another document", "a second YAML document starts here", "one file holds one topology: remove the ---"),
    ("mapping values are not allowed", "a ': ' that YAML cannot place", "quote the value, or mend the indentation"),
    ("could not find expected ':'", "a line that is no 'key: value'", "put a ': ' after the key"),
    ("expected <block end>", "an indentation that fits nothing above", "align it with its siblings"),
    ("found undefined alias", "an alias without its anchor", "define &name above the first *name"),
    ("found duplicate anchor", "an anchor that is defined twice", "give the second one another name"),
    ("while scanning a quoted scalar", "a quote that is never closed", "close the quote"),
)


@dataclass(frozen=True, slots=True)
class Parsed:
    """``broken``: trails whose value could not be made out; what is found below them would only confuse."""

    document: Document
    mistakes: tuple[Mistake, ...]
    broken: frozenset[Trail]


class _Loader(yaml.SafeLoader):
    """Gives no tag of its own: what a scalar is gets decided once its references have their values."""

    def resolve(self, kind: type[Node], value: object, implicit: tuple[bool, bool]) -> str:
        return _PLAIN if kind is ScalarNode and implicit[0] else _IMPLIED


def read_text(path: Path) -> str:
    """The file's text with plain line feeds. Raises TopologyError when there is no such text."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise _unreadable(path, "no such file", "epdctl init writes one to begin with") from None
    except IsADirectoryError:
        raise _unreadable(path, "is a directory", "name the YAML file in it") from None
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}", None) from error
    if len(data) > MAX_FILE_BYTES:
        raise _unreadable(path, f"is larger than {MAX_FILE_BYTES >> 20} MiB", "is it a topology at all?")
    return _decoded(path, data).replace("\r\n", "\n").replace("\r", "\n")


def parse(file: str, text: str, environ: Mapping[str, str]) -> Parsed:
    """Raises TopologyError when the text is no YAML mapping; lesser mistakes come back with the data."""
    reserved = RESERVED.search(text)
    if reserved:
        problem = f"the character U+{ord(reserved[0]):04X} is for private use"
        raise _fatal(file, place_of(text, reserved.start()), problem, "remove it")
    masked = mask(text)
    root = _compose(file, masked.text)
    if root is None or (isinstance(root, ScalarNode) and not root.value):
        raise _fatal(file, Place(1, 1), "the file is empty", "epdctl init writes one to begin with")
    if not isinstance(root, MappingNode):
        raise _fatal(file, _start(root), f"the file holds {_kind(root)}", "write a mapping: model: …, stages: …")
    walk = _Walk(file, masked, environ)
    try:
        data = walk.mapping(root, (), 0)
    except _TooMuchError as error:
        raise _fatal(file, error.place, error.problem, "is an alias inside its own anchor?") from None
    document = Document(file, data, walk.keys, walk.values)
    return Parsed(document, tuple(walk.mistakes), frozenset(walk.broken))


class _TooMuchError(Exception):
    """Aliases within aliases, or a depth no topology has; raised at the node where it showed."""

    def __init__(self, node: Node, problem: str) -> None:
        super().__init__(problem)
        self.place = _start(node)
        self.problem = problem


class _Walk:
    """Turns nodes into data, noting where each thing stands."""

    def __init__(self, file: str, masked: Masked, environ: Mapping[str, str]) -> None:
        self.keys: dict[Trail, Place] = {}
        self.values: dict[Trail, Place] = {}
        self.mistakes: list[Mistake] = []
        self.broken: set[Trail] = set()
        self._at = Document(file, {}, self.keys, self.values)
        self._masked = masked
        self._environ = environ
        self._nodes = 0

    def mapping(self, node: MappingNode, trail: Trail, depth: int) -> dict[str, object]:
        data: dict[str, object] = {}
        for key, key_node, value_node in self._entries(node, trail, depth):
            below = (*trail, key)
            if key not in data:
                self.keys[below] = _start(key_node)
                data[key] = self._value(value_node, below, depth + 1)
        return data

    def _value(self, node: Node, trail: Trail, depth: int) -> object:
        self._count(node, depth)
        self.values[trail] = _start(node)
        if node.tag not in (_PLAIN, _IMPLIED):
            self._report(node, trail, f"the tag {node.tag!r} means nothing here", "remove it")
        if isinstance(node, MappingNode):
            return self.mapping(node, trail, depth)
        if isinstance(node, SequenceNode):
            return [self._value(item, (*trail, index), depth + 1) for index, item in enumerate(node.value)]
        return self._scalar(node, trail)

    def _scalar(self, node: Node, trail: Trail) -> object:
        text = self._masked.unmask(node.value, lambda reference: self._look_up(reference, trail))
        return _typed(text) if node.tag == _PLAIN else text

    def _look_up(self, reference: Reference, trail: Trail) -> str:
        try:
            return resolve(reference.text, self._environ)
        except UnresolvedError as error:
            self.broken.add(trail)
            self.mistakes.append(self._at.mistake_at(reference.place, trail, error.problem, error.remedy))
            return ""

    def _entries(self, node: MappingNode, trail: Trail, depth: int) -> Iterator[tuple[str, Node, Node]]:
        """Keys of the mapping itself, then what ``<<`` brings; a key that comes again later is overridden."""
        self._count(node, depth)
        merges: list[Node] = []
        seen: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _PLAIN and key_node.value == "<<":
                merges.append(value_node)
                continue
            key = self._key(key_node, trail)
            if key is None:
                continue
            if key in seen:
                first = _start(seen[key])
                self._report(key_node, (*trail, key), f"{key!r} is there already, in line {first.line}", "keep one")
                continue
            seen[key] = key_node
            yield key, key_node, value_node
        for merge in merges:
            yield from self._merged(merge, trail, depth + 1)

    def _merged(self, node: Node, trail: Trail, depth: int) -> Iterator[tuple[str, Node, Node]]:
        for item in node.value if isinstance(node, SequenceNode) else [node]:
            if isinstance(item, MappingNode):
                yield from self._entries(item, trail, depth)
            else:
                self._report(item, trail, "<< merges mappings only", "write <<: *name of an anchored mapping")

    def _key(self, node: Node, trail: Trail) -> str | None:
        key = self._scalar(node, trail) if isinstance(node, ScalarNode) else None
        if isinstance(key, str) and key:
            return key
        shown = key if isinstance(node, ScalarNode) else _kind(node)
        self._report(node, trail, f"a key should be a word, found {shown!r}", "write name: value")
        return None

    def _report(self, node: Node, trail: Trail, problem: str, remedy: str) -> None:
        self.mistakes.append(self._at.mistake_at(_start(node), trail, problem, remedy))

    def _count(self, node: Node, depth: int) -> None:
        self._nodes += 1
        if depth > MAX_DEPTH:
            raise _TooMuchError(node, f"nested deeper than {MAX_DEPTH}")
        if self._nodes > MAX_NODES:
            raise _TooMuchError(node, f"more than {MAX_NODES} values")


def _typed(text: str) -> object:
    for pattern, make in _SCALARS:
        if pattern.fullmatch(text):
            return make(text)
    return text


def _compose(file: str, text: str) -> Node | None:
    try:
        loader = _Loader(text)
        try:
            node: Node | None = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)
        raise _fatal(file, place, *_advice(error)) from error
    except yaml.reader.ReaderError as error:
        problem = f"the character U+{int(error.character):04X} is not allowed in YAML"
        raise _fatal(file, place_of(text, error.position), problem, "remove it") from error
    except RecursionError:
        raise _fatal(file, Place(1, 1), "nested too deeply to be read", "is it a topology at all?") from None
    return node


def _advice(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    said = " ".join(part for part in (error.context, error.problem) if part)
    for part, problem, remedy in _ADVICE:
        if part in said:
            return problem, remedy
    return f"not YAML: {said}", "mend the line, or quote the value"


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig")
        place = place_of(before, len(before))
        raise _fatal(
            str(path), place, f"byte 0x{data[error.start]:02x} is not UTF-8", "save the file as UTF-8"
        ) from None


def _unreadable(path: Path, problem: str, remedy: str | None) -> TopologyError:
    return TopologyError([Mistake(str(path), "", problem, remedy)])


def _fatal(file: str, place: Place, problem: str, remedy: str) -> TopologyError:
    return TopologyError([Document(file, {}).mistake_at(place, (), problem, remedy)])


def _start(node: Node) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)


def _kind(node: Node) -> str:
    if isinstance(node, MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, SequenceNode) else "a single value"
