"""What the site has beside the pages under docs: the README, the results, every flag.

mkdocs calls the functions whose names begin with on_. A link that leads out of docs, which is right
where the repository is read, is made to lead to the page that the site has for that file.
"""

import ast
import io
import re
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from dbkernels.cli.main import Verb, main
from dbkernels.models.registry import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = {  # by the file in the repository
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
    "LICENSE": "license.md",
}
LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are elsewhere, or that nobody writes."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if not source.endswith(".md"):
            text = f"# {source.capitalize()}\n\n```text\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "flags.md", content=flags()))
    files.append(File.generated(config, "examples.md", content=examples()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead each link to the site's page for a file of the repository, and call it by its title."""
    sources = {page: source for source, page in PAGES.items()}
    here = Path(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def lead(link: re.Match) -> str:
        text, target = link[1], (ROOT / here / link[2]).resolve()
        if text.endswith(target.name) and target.suffix == ".md":
            text = _title(target)
        return f"[{text}]({_address(target, page.file)}{link[3] or ''})"

    return LINK.sub(lead, markdown)


def _title(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _address(target: Path, here: File) -> str:
    """Of a file of the repository, from a page."""
    name = target.relative_to(ROOT).as_posix()
    up = "../" * here.src_uri.count("/")
    if name.startswith("docs/"):
        return up + name.removeprefix("docs/")
    if name in PAGES:
        return up + PAGES[name]
    room = name.split("/")[1] if name.startswith("dbkernels/") else ""
    if (ROOT / "docs" / "api" / f"{room}.md").exists():
        return f"{up}api/{room}.md"
    if name.startswith("examples/"):
        return f"{up}examples.md#{target.stem}"
    raise ValueError(f"{here.src_uri} must link to pages and files of the site, got {name}")


def examples() -> str:
    """Every script under examples, whole, and the files for clusters."""
    parts = ["# Examples", "Scripts to copy from, under `examples` in the repository."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8").rstrip()
        title, _, _ = ast.get_docstring(ast.parse(text)).partition("\n")
        heading = f"## {title.rstrip('.')} {{ #{path.stem} }}"
        parts += [heading, f"`examples/{path.name}`", f"```python\n{text}\n```"]
    for path in sorted((ROOT / "examples" / "cluster").iterdir()):
        text = path.read_text(encoding="utf-8").rstrip()
        title = next(line for line in text.splitlines() if line.startswith("# "))
        heading = f"## {title[2:].partition(':')[0].rstrip('.')} {{ #{path.stem} }}"
        kind = {".sh": "bash"}.get(path.suffix, "yaml")
        parts += [heading, f"`examples/cluster/{path.name}`", f"```{kind}\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def flags() -> str:
    """What `--help` says of every verb, and of every family that `train` trains."""
    parts = ["# Every flag", "What `python -m dbkernels VERB --help` prints."]
    for verb in (each.__name__.lower() for each in get_args(Verb)):
        for words in [[verb, name] for name in FAMILIES] if verb == "train" else [[verb]]:
            parts += [f"## {' '.join(words)}", f"```text\n{_help(words)}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(words: list[str]) -> str:
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out), suppress(SystemExit):
        main([*words, "--help"])
    return out.getvalue().strip()
