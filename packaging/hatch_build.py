"""The build hook: manual pages and completions go into the wheel, and from there to where pip installs to."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Hook(BuildHookInterface):  # type: ignore[misc]  # hatchling is there only in a build
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # that is for a developer
            return
        sys.path[:0] = [self.root, str(Path(self.root, "packaging"))]
        import pages

        self._folder = tempfile.TemporaryDirectory()  # removed with the hook
        build_data["shared_data"] |= {
            f"{self._folder.name}/{path}": path for path in pages.write(Path(self._folder.name))
        }
