"""Structured logs on the standard logging module: short text lines for people, JSON lines for machines.

A message is a constant sentence; what varies goes beside it: `log.info("synced", extra={"services": 3})`, or
`extra=fields(name="web")` for names that logging keeps for itself. Both formats put one record on one line
whatever names an API object brings, and writing a log never fails: an agent whose standard error is gone keeps
the node's services working.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal

_ROOT = "miniproxy"
_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}  # attributes that are no fields
_LETTERS = {"DEBUG": "D", "INFO": "I", "WARNING": "W", "ERROR": "E", "CRITICAL": "E"}


def fields(**values: Any) -> dict[str, Any]:
    """What to hand to a logging call as `extra`: the record's fields, in order."""
    return {"fields": values}


def get(name: str) -> logging.Logger:
    """The logger of a room: "reconciler" or "miniproxy.reconciler"."""
    return logging.getLogger(name if name == _ROOT or name.startswith(f"{_ROOT}.") else f"{_ROOT}.{name}")


def setup(format: Literal["text", "json"] = "text", verbosity: int = 0) -> None:
    """Log to standard error from now on; may be called again, the last call counts.

    `verbosity` as kube-proxy's --v: from 4 on with details (DEBUG), from 8 on those of libraries too.
    """
    handler = _StandardError()
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _StandardError)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if verbosity >= 8 else logging.WARNING)
    logging.getLogger(_ROOT).setLevel(logging.DEBUG if verbosity >= 4 else logging.INFO)
    logging.captureWarnings(True)


class _StandardError(logging.Handler):
    """Writes to the standard error of the moment; when it is closed, full or missing, the line is lost."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
            sys.stderr.write(line)
            sys.stderr.flush()
        except Exception:
            # logging's own handler would write a traceback to the same stream, and raise if that is closed.
            pass


class TextFormatter(logging.Formatter):
    """`12:01:02.345 I reconciler: synced services=3 reason="two words"`, local time."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        head = f"{clock}.{int(record.msecs):03d} {_LETTERS.get(record.levelname, '?')} {_short(record.name)}: "
        parts = [_line(record.getMessage())]
        parts += [f"{key}={_value(value)}" for key, value in _fields(record).items()]
        text = head + " ".join(parts)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """One object per line: ts (RFC 3339, UTC), level, logger, msg, fields, and error with a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "ts": f"{clock}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": _short(record.name),
            "msg": record.getMessage(),
        }
        if values := _fields(record):
            entry["fields"] = values
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller handed over as `extra`, either way."""
    values: dict[str, Any] = {key: value for key, value in vars(record).items() if key not in _OWN}
    values.update(values.pop("fields", {}))
    return values


def _short(logger: str) -> str:
    return logger.removeprefix(f"{_ROOT}.")


def _value(value: object) -> str:
    """A field's value, in quotes when it is not one plain word."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    plain = text and text.isprintable() and not any(c in text for c in ' "=')
    return text if plain else json.dumps(text, ensure_ascii=not text.isprintable())


def _line(text: str) -> str:
    """Text that stays on its line: a name from the API cannot forge a second record."""
    return text if text.isprintable() else json.dumps(text)[1:-1]
