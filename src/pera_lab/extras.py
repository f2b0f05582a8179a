"""Optional packages: which extra of pera installs them, and what to tell a user who lacks one."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

if TYPE_CHECKING:
    from pera.errors import UserError


def missing_extra(package: str, extra: str) -> UserError:
    """The error for an optional ``package`` that is not installed. ``extra`` is the extra of pera that installs it."""
    from pera.errors import UserError  # imports torch, which the command does not need to name a missing package

    return UserError(f"this needs the package {package!r}; install it with: {install_command(extra)}")


def install_command(extra: str) -> str:
    """The command that adds an extra of pera, from where pera was installed.

    Returns:
        ``pip install 'pera[lab]'`` for a package from the index. For a checkout, ``pip install '.[lab]'`` in its folder
        and ``pip install '/path/of/it[lab]'`` elsewhere, with ``-e`` if it is installed in that way.
    """
    url, editable = _origin()
    if not url:
        return f"pip install {shlex.quote(f'pera[{extra}]')}"
    folder = Path(url2pathname(urlsplit(url).path))
    if urlsplit(url).scheme != "file" or not folder.is_dir():
        return f"pip install {shlex.quote(f'pera[{extra}] @ {url}')}"
    where = "." if folder == Path.cwd() else folder
    return f"pip install {'-e ' if editable else ''}{shlex.quote(f'{where}[{extra}]')}"


def _origin() -> tuple[str, bool]:
    """The URL that pera was installed from, empty for the index, and whether the installation is editable."""
    try:
        recorded = json.loads(distribution("pera").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return "", False
    url = recorded.get("url", "")
    if vcs := recorded.get("vcs_info"):
        return f"{vcs['vcs']}+{url}@{vcs['commit_id']}", False
    return url, bool(recorded.get("dir_info", {}).get("editable"))
