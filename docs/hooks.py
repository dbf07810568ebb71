"""mkdocs: pages link to files of the repository as they lie there; the site has the results, and names the others.

A file under ``eval/results`` is a page or a picture of the site. Any other file outside of ``docs`` becomes its path in
code font, so that the pages read the same on a code host and in the site.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "eval/results"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the committed results to the site."""
    for path in sorted((ROOT / RESULTS).rglob("*")):
        if path.suffix in (".md", ".png"):
            place = path.relative_to(ROOT).as_posix()
            files.append(File(place, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links of a page at the site's files."""
    source = page.file.src_uri
    is_result = source.startswith(RESULTS)
    here = PurePosixPath(source if is_result else f"docs/{source}").parent

    def replaced(match: re.Match) -> str:
        mark, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        place = os.path.normpath(here / target)
        inside = place.removeprefix("docs/")
        if files.get_file_from_path(inside) is None:
            return f"{text} (`{place}`)" if text != f"`{place}`" else text
        start = PurePosixPath(source).parent
        return f"{mark}[{text}]({os.path.relpath(inside, start)}{anchor})"

    return LINK.sub(replaced, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name things by the roles of Sphinx; here the name in code font is enough."""
    return re.sub(r":(?:class|meth|func|data|mod|attr):(?=<code>)", "", html).replace("::</p>", ":</p>")
