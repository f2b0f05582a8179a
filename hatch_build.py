"""The page and the links that a package index shows.

README.md has relative links, which work in a checkout and on a code host. A package index needs absolute ones. They are
made from the environment variable PERA_REPOSITORY, the address of the repository, which the release workflow sets.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class PackageIndexPage(MetadataHookInterface):
    """Fills in the readme and the project's addresses."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add ``readme`` and ``urls``."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        urls = {"Paper": "https://arxiv.org/abs/2604.11841"}
        repository = os.environ.get("PERA_REPOSITORY", "").rstrip("/")
        if repository:
            urls |= {
                "Repository": repository,
                "Documentation": f"{repository}/tree/main/docs",
                "Changelog": f"{repository}/blob/main/CHANGELOG.md",
                "Issues": f"{repository}/issues",
            }
            text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{repository}/raw/main/", text)
            text = re.sub(r"((?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\()(?!https?:|#)", rf"\1{repository}/blob/main/", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls
