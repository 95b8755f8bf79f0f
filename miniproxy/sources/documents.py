"""The text of a manifest file → its documents, each with the lines it stands on.

It answers for reading hostile YAML and JSON without falling over (bombs of anchors, bottomless nesting) and
for saying where in the file something stands. It knows lists (`kind: List`, ServiceList, …) and takes them
apart; what the documents mean is checked by wire.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import yaml

from ..model import Kind
from .wire import LIST_KINDS, ObjectList, head

if TYPE_CHECKING:
    _Base = yaml.SafeLoader
else:
    _Base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times faster

MAX_DEPTH = 200  # libyaml's composer recurses in C and would overflow the stack: a crash, not an exception
MAX_ALIASED = 1_000_000  # nodes that aliases may add to a file


class DocumentError(Exception):
    """The file cannot be read as a whole."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason


class Document(NamedTuple):
    """One object of a file, undecoded, or the reason why it cannot be one."""

    raw: object  # for wire.convert
    kind: Kind | None  # what its list says it is
    line: int
    locate: Callable[[str], int]  # field path → line
    field: str = ""
    wrong: str = ""


def documents(data: bytes, is_json: bool) -> Iterator[Document]:
    """All objects in a file, lists taken apart. Raises DocumentError, perhaps after some of them."""
    return _json(data) if is_json else _yaml(data)


def _broken(line: int, wrong: str, field: str = "") -> Document:
    return Document(None, None, line, lambda _: line, field, wrong)


# --- YAML -------------------------------------------------------------------------------------------------


class _Loader(_Base):
    """YAML as Kubernetes' tools read it: times are text, and 1:20:30 is no number in base 60.

    An address such as 2001:10:20:30:40:50:51:52 would be one in plain YAML 1.1.
    """


_INT = r"[-+]?(?:0|[1-9][0-9]*|0x[0-9a-fA-F]+|0[0-7]+)$"
_FLOAT = r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
_REPLACED = {"timestamp", "int", "float", "value"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in _REPLACED]
    for first, resolvers in _Base.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(_INT), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"))


def _yaml(data: bytes) -> Iterator[Document]:
    try:
        _check_size(data)
        loader = _Loader(data)
    except yaml.YAMLError as error:
        raise _yaml_error(error, data) from None
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is not None:
                yield from _of_node(node, _construct(loader, node), None)
    except yaml.YAMLError as error:
        raise _yaml_error(error, data) from None
    finally:
        loader.dispose()


def _check_size(data: bytes) -> None:
    """Refuse, before anything is built, what would grow out of bounds when it is."""
    sizes: dict[str, int] = {}  # anchor → nodes below it, aliases counted in full
    open_: list[tuple[str | None, int]] = []  # (anchor, count when it began)
    count = aliased = 0
    for event in yaml.parse(data, Loader=_Loader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.NodeEvent):
            line = event.start_mark.line + 1 if event.start_mark else 1
            count += 1
            if isinstance(event, yaml.AliasEvent):
                size = sizes.get(event.anchor or "", 1)
                count += size
                aliased += size
            elif isinstance(event, yaml.CollectionStartEvent):
                open_.append((event.anchor, count))
            if aliased > MAX_ALIASED:
                raise DocumentError(line, f"aliases make more than {MAX_ALIASED} nodes: write them out")
            if len(open_) > MAX_DEPTH:
                raise DocumentError(line, f"is nested more than {MAX_DEPTH} deep: no object is")


def _construct(loader: Any, node: yaml.Node) -> object:
    try:
        return loader.construct_document(node)
    except yaml.YAMLError:
        raise
    except Exception as error:  # what "!!int x" or "!!timestamp x" raises is anything but a YAMLError
        raise DocumentError(_line(node), f"has a value that cannot be read: {error}") from None


def _yaml_error(error: yaml.YAMLError, data: bytes) -> DocumentError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        parts = (getattr(error, "context", None), getattr(error, "problem", None))
        return DocumentError(mark.line + 1, "is not YAML: " + ", ".join(part for part in parts if part))
    position = getattr(error, "position", 0) or 0
    reason = getattr(error, "reason", str(error))
    return DocumentError(data[:position].count(b"\n") + 1, f"is not YAML: {reason}")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _of_node(node: yaml.Node, raw: object, kind: Kind | None, inside: str = "") -> Iterator[Document]:
    """The document, or the items of a list."""
    line = _line(node)
    if raw is None and not inside:
        return  # nothing between two "---"
    if not isinstance(raw, dict):
        yield _broken(line, "must be a map with apiVersion, kind and metadata", inside)
        return
    stated = raw.get("kind")
    if kind is None and not (isinstance(stated, str) and stated):
        yield _broken(line, "has no kind: write one such as Service", f"{inside}.kind" if inside else "kind")
    elif not isinstance(stated, str) or stated not in LIST_KINDS:
        yield Document(raw, kind, line, lambda path: _locate(node, path))
    elif inside:
        yield _broken(line, "is a list inside a list: write its items in the outer one", inside)
    else:
        yield from _items(node, raw.get("items"), LIST_KINDS[stated])


def _items(node: yaml.Node, items: object, kind: Kind | None) -> Iterator[Document]:
    if items is None:
        return
    below = _child(node, "items")
    if not isinstance(items, list) or not isinstance(below, yaml.SequenceNode):
        yield _broken(_line(below or node), "must be a list", "items")
        return
    for i, (item, raw) in enumerate(zip(below.value, items, strict=True)):
        yield from _of_node(item, raw, kind, f"items[{i}]")


def _child(node: yaml.Node, key: str) -> yaml.Node | None:
    if isinstance(node, yaml.SequenceNode):
        return node.value[int(key)] if key.isdecimal() and int(key) < len(node.value) else None
    if isinstance(node, yaml.MappingNode):
        # the last one wins, as it does in the map made of them
        return next((value for name, value in reversed(node.value) if name.value == key), None)
    return None


def _locate(node: yaml.Node, path: str) -> int:
    """The line of a field such as spec.ports[1].nodePort, or of the innermost thing around it that exists."""
    for name, index in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", path):
        child = _child(node, name or index)
        if child is None:
            break
        node = child
    return _line(node)


# --- JSON -------------------------------------------------------------------------------------------------


def _json(data: bytes) -> Iterator[Document]:
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise DocumentError(data[: error.start].count(b"\n") + 1, "is not UTF-8 text") from None
    for raw, line in _values(text):
        yield from _of_json(raw, line, None)


_SPACE = re.compile(r"[ \t\r\n]*")


def _values(text: str) -> Iterator[tuple[bytes, int]]:
    """Each value of a file and its line. Nearly always there is one; then the fast decoder takes it."""
    start, line = _skip(text, 0, 0, 1)
    if start == len(text):
        return
    try:
        msgspec.json.decode(whole := text.strip().encode())
        yield whole, line
        return
    except (msgspec.DecodeError, RecursionError):
        pass  # several values, or a mistake: the standard library can tell which, and where
    decoder = json.JSONDecoder()
    while start < len(text):
        try:
            _, end = decoder.raw_decode(text, start)
            msgspec.json.decode(value := text[start:end].encode())  # stricter: no NaN, no lone surrogates
        except json.JSONDecodeError as error:
            raise DocumentError(error.lineno, f"is not JSON: {error.msg}") from None
        except (msgspec.DecodeError, ValueError) as error:
            raise DocumentError(line, f"is not JSON: {error}") from None
        except RecursionError:
            raise DocumentError(line, "is nested too deep: no object is") from None
        yield value, line
        start, line = _skip(text, start, end, line)


def _skip(text: str, start: int, end: int, line: int) -> tuple[int, int]:
    """Where the next value begins and on which line, when the one from `start` on `line` ends at `end`."""
    space = _SPACE.match(text, end)
    following = space.end() if space else end
    return following, line + text.count("\n", start, following)


def _of_json(data: bytes, line: int, kind: Kind | None, inside: str = "") -> Iterator[Document]:
    if not data.startswith(b"{"):
        yield _broken(line, "must be a map with apiVersion, kind and metadata", inside)
        return
    stated = "" if kind else head(data).kind
    if kind is None and not stated:
        yield _broken(line, "has no kind: write one such as Service", f"{inside}.kind" if inside else "kind")
    elif stated not in LIST_KINDS:
        yield Document(data, kind, line, lambda _: line)
    elif inside:
        yield _broken(line, "is a list inside a list: write its items in the outer one", inside)
    else:
        yield from _json_items(data, line, LIST_KINDS[stated])


def _json_items(data: bytes, line: int, kind: Kind | None) -> Iterator[Document]:
    try:
        items = msgspec.json.decode(data, type=ObjectList).items or []
    except msgspec.ValidationError:
        yield _broken(line, "must be a list of objects", "items")
        return
    at = 0
    for i, item in enumerate(items):
        # Items come in the order of the text: the next one like it is this one, or nested in this list's head.
        raw = bytes(item)
        found = data.find(raw, at)
        line += data.count(b"\n", at, found)
        at = found
        yield from _of_json(raw, line, kind, f"items[{i}]")
        at += 1
