"""Coverage of a session and of the processes that it starts. It begins before pytest is imported."""

from __future__ import annotations

import os
import shutil
import tempfile
import types
from collections.abc import Iterator
from typing import Any

import coverage

from .apart import keep_apart
from .wire import Wire, clean

keep_apart(globals())


class CoverageTracer:
    """Measures coverage from its creation on.

    Args:
        options: of coverage: name → text, or list of texts.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.folder = tempfile.mkdtemp(prefix="vmsandbox-coverage-")
        settings = os.path.join(self.folder, "settings")
        self.data = os.path.join(self.folder, "data")
        # A file, because processes that tests start read it, too.
        with open(settings, "w", encoding="utf-8") as file:
            file.write("[run]\nparallel = true\ndata_file = %s\n" % self.data)
            # Where there is no wheel with the C tracer, the guest cannot help it.
            file.write("disable_warnings = no-ctracer\n")
            for name, value in options.items():
                text = "\n    ".join(["", *value]) if isinstance(value, list) else value
                file.write("%s = %s\n" % (name, text.replace("$", "$$")))
        self.coverage = coverage.Coverage(config_file=settings)
        self.coverage.start()

    def plugin(self) -> types.ModuleType:
        """A plugin with pytest-cov's fixture `cov`, its fixture `no_cover` and its marker of that name."""
        import pytest

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
            names = getattr(item, "fixturenames", ())
            if "no_cover" not in names and item.get_closest_marker("no_cover") is None:
                yield
                return
            self.coverage.stop()
            try:
                yield
            finally:
                self.coverage.start()

        module = types.ModuleType("vmsandbox_coverage")
        vars(module)["pytest_runtest_call"] = pytest_runtest_call
        vars(module)["cov"] = pytest.fixture(name="cov")(lambda: self.coverage)
        return module

    def tell(self, wire: Wire, tree: str) -> None:
        """Stop, and send what was measured for the files of a tree."""
        self.coverage.stop()
        self.coverage.save()
        whole = coverage.Coverage(data_file=self.data, config_file=False)
        whole.combine()
        data = whole.get_data()
        for name in data.measured_files():
            if name.startswith(tree + "/"):
                kind = "arcs" if data.has_arcs() else "lines"
                wire.note(
                    clean({"covered": name[len(tree) + 1 :], kind: getattr(data, kind)(name)})
                )
        data.close()
        shutil.rmtree(self.folder, ignore_errors=True)
