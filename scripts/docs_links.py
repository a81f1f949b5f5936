"""A hook of mkdocs: links from pages to files of the checkout become the names of these files.

The site holds the pages of docs alone; in a checkout the links lead to the code.
"""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./|schemas)([^)]*)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the links of a page."""
    return OUTSIDE.sub(r"\1 (`\2`)", markdown)
