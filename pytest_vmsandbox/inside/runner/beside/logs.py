"""Records of logs, for the live log or the log file of the host."""

from __future__ import annotations

import logging
import os
from typing import Any

from ..apart import keep_apart
from ..values import clean
from ..wire import Wire

keep_apart(globals())

RECORD = (
    "name", "levelno", "levelname", "pathname", "lineno", "funcName", "created", "msecs",
    "process", "processName", "thread", "threadName", "taskName", "stack_info",
)  # fmt: skip


def send_records(config: Any, wire: Wire) -> None:
    """Send the records of tests from now on.

    They come by way of pytest's handler for the log file, which no test inside has.
    """
    plugin = config.pluginmanager.get_plugin("logging-plugin")
    if plugin is None:
        return
    formatter = logging.Formatter()

    class Records(type(plugin.log_file_handler)):  # type: ignore[misc]
        def setLevel(self, level: object) -> None:  # noqa: N802  # the host looks at levels
            pass

        def emit(self, record: logging.LogRecord) -> None:
            try:
                text = record.getMessage()
                trace = record.exc_info and formatter.formatException(record.exc_info)
            except Exception as error:  # of the test, which pytest lets fail
                text, trace = "%s (%r)" % (record.msg, error), None
            found = {name: getattr(record, name, None) for name in RECORD}
            found.update(msg=text, exc_text=trace or None)
            when = getattr(plugin.log_cli_handler, "_when", None)
            wire.say({"logged": clean(found), "when": clean(when)})
            if self.stream is not None:  # a hook has named a file
                super().emit(record)

    plugin.log_file_handler = Records(os.devnull, delay=True)
