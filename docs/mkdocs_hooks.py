"""Hooks of MkDocs: pages from outside docs/, the API reference, and links between them."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lcm_ds"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "findings/README.md": "findings.md",
}
TOP_LEVEL = [PACKAGE / f"{name}.py" for name in ("api", "config", "metrics", "errors")]
SOURCES = {page: ROOT / source for source, page in PAGES.items()}


def on_config(config: MkDocsConfig) -> None:
    """Add the reference to the navigation."""
    config.nav.append({"Reference": list(reference())})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that have no file in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, text in reference().items():
        files.append(File.generated(config, page, content=text))


def reference() -> dict[str, str]:
    """A page of mkdocstrings directives for the modules that users call, and one for each folder of the package."""
    pages = {"reference/index.md": "# lcm_ds\n\n" + "".join(map(_directive, TOP_LEVEL))}
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        text = "".join(map(_directive, sorted(path for path in folder.rglob("*.py") if path.name != "__main__.py")))
        readme = folder / "README.md"
        head = readme.read_text(encoding="utf-8") if readme.exists() else f"# lcm_ds.{folder.name}\n"
        pages[f"reference/{folder.name}.md"] = f"{head}\n{text}"
        SOURCES[f"reference/{folder.name}.md"] = readme
    return pages


def _directive(module: Path) -> str:
    return f"::: {_module(module)}\n\n"


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links and images to the files of the site, and to the reference for modules; other links become text."""
    source = SOURCES.get(page.file.src_uri, ROOT / "docs" / page.file.src_uri)

    def resolve(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        url = urlsplit(target)
        if url.scheme or not url.path:
            return link[0]
        path = Path(os.path.normpath(source.parent / url.path))
        name = path.relative_to(ROOT).as_posix()
        uri, anchor = PAGES.get(name) or name.removeprefix("docs/"), url.fragment
        if PACKAGE in path.parents:
            uri = f"reference/{'index' if path in TOP_LEVEL else path.relative_to(PACKAGE).parts[0]}.md"
            anchor = _module(path) if path.suffix == ".py" or path.is_dir() else ""
        if files.get_file_from_path(uri) is None:
            return link[0] if image else text
        relative = os.path.relpath(uri, Path(page.file.src_uri).parent)
        return f"{image}[{text}]({relative}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?)\[([^\]]+)\]\(([^)\s]+)\)", resolve, markdown)
