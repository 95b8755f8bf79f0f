"""A KubeProxyConfiguration file as a flat list of the fields it gives, each with its line.

It answers for the file's form: YAML or JSON, no unknown field, no field twice. What the values mean is
config.py's business. Working on YAML's node tree rather than on dicts keeps the lines and shows duplicates.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .config_schema import API_VERSION, FIELDS, KIND, show

if TYPE_CHECKING:
    import yaml

_LEAVES = {field.path for field in FIELDS}
_SECTIONS = {path.rpartition(".")[0] for path in _LEAVES} | {"logging.options"}
_LIMIT = 1 << 20  # a ConfigMap cannot hold more than 1 MiB


class Entry(NamedTuple):
    """A field as given; `value` is plain data, None for null."""

    path: str
    value: object
    line: int


def read(file: Path) -> tuple[list[Entry], list[str]]:
    """The entries of `file` and what is wrong with its form, as "FILE:LINE: FIELD: REASON"."""
    try:
        if file.stat().st_size > _LIMIT:
            return [], [f"{file}: is larger than 1 MiB, which no configuration is"]
        content = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        return [], [f"{file}: cannot be read: {error.strerror}"]
    except UnicodeDecodeError as error:
        return [], [f"{file}: is not UTF-8 text (byte {error.start})"]
    return parse(content, str(file))


def parse(content: str, name: str) -> tuple[list[Entry], list[str]]:
    """As `read`, of text; `name` stands for the file in problems."""
    import yaml

    if content.lstrip().startswith("{"):
        # JSON is YAML but for tabs between tokens; inside of JSON's strings there are none.
        content = content.replace("\t", " ")
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        return [], [f"{where}: is not YAML or JSON: {error.problem or error.context}"]
    except yaml.YAMLError as error:
        return [], [f"{name}: is not YAML or JSON: {' '.join(str(error).split())}"]
    except RecursionError:
        return [], [f"{name}: is nested too deeply"]
    if not isinstance(root, yaml.MappingNode):
        return [], [f"{name}: holds no {KIND}: it must begin with apiVersion: {API_VERSION} and kind: {KIND}"]
    walk = _Walk(name)
    walk.section(root, "")
    if foreign := _identity(walk.entries, name):
        return [], foreign
    return walk.entries, walk.problems


def _identity(entries: list[Entry], name: str) -> list[str]:
    """Whether it is a KubeProxyConfiguration at all; if not, nothing else about it is worth saying."""
    given = {entry.path: entry for entry in entries}
    problems = []
    for path, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
        entry = given.get(path)
        if entry is None:
            problems.append(f"{name}: {path}: is missing; it must be {wanted}")
        elif entry.value == "ConfigMap":
            return [
                f"{name}:{entry.line}: kind: is the ConfigMap around the configuration; get its text with: "
                r"kubectl -n kube-system get configmap kube-proxy -o jsonpath='{.data.config\.conf}'"
            ]
        elif entry.value != wanted:
            problems.append(f"{name}:{entry.line}: {path}: {show(entry.value)} is not {wanted}")
    return problems


class _Walk:
    """Collects entries and problems from YAML nodes, section by section."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[Entry] = []
        self.problems: list[str] = []

    def section(self, node: yaml.MappingNode, path: str) -> None:
        seen: dict[str, int] = {}
        for key_node, value in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            field = f"{path}.{key}" if path else key
            if key in seen:
                self._problem(line, field, f"is given twice, first in line {seen[key]}")
            elif field in _LEAVES:
                self.entries.append(Entry(field, _plain(value), line))
            elif field in _SECTIONS:
                self._enter(value, field, line)
            else:
                self._problem(line, field, "is not a field of KubeProxyConfiguration" + _suggest(key, path))
            seen.setdefault(key, line)

    def _enter(self, value: yaml.Node, field: str, line: int) -> None:
        import yaml

        if isinstance(value, yaml.MappingNode):
            self.section(value, field)
        elif _plain(value) is not None:
            self._problem(line, field, f"{show(_plain(value))} is not a map of fields")

    def _problem(self, line: int, field: str, reason: str) -> None:
        self.problems.append(f"{self.name}:{line}: {show(field)[1:-1]}: {reason}")


def _plain(node: yaml.Node) -> object:
    """A node's value; timestamps and other exotic scalars as the text they are written as."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _plain(value) for key, value in node.value if not _nested(value)}
    if isinstance(node, yaml.SequenceNode):
        return [None if _nested(item) else _plain(item) for item in node.value]
    if node.tag.rpartition(":")[2] in ("null", "bool", "int", "float"):
        try:
            return yaml.constructor.SafeConstructor().construct_object(node)
        except (ValueError, LookupError):
            pass  # "!!int x", or more digits than int() takes
    return str(node.value)


def _nested(node: yaml.Node) -> bool:
    """No field is a map of maps or a list of lists, and an anchor that holds itself would never end."""
    return not isinstance(node.value, str)


def _suggest(key: str, section: str) -> str:
    """The field that was probably meant: same section first, then the same name anywhere."""
    current = sorted(({field.path for field in FIELDS if not field.ignored} | _SECTIONS) - {""})
    here = {p.rpartition(".")[2].lower(): p for p in current if p.rpartition(".")[0] == section}
    anywhere: dict[str, list[str]] = {}
    for path in current:
        anywhere.setdefault(path.rpartition(".")[2].lower(), []).append(path)
    if near := get_close_matches(key.lower(), here, n=1, cutoff=0.75):
        return f"; did you mean {here[near[0]]}?"
    if near := get_close_matches(key.lower(), anywhere, n=1, cutoff=0.8):
        return f"; did you mean {' or '.join(anywhere[near[0]])}?"
    return ""
