"""Documentation sources (reStructuredText or plain) as readable prose, and the split into training and held-out files."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 16  # one file in 16 is never trained on

_SILENT = {  # directives whose whole block says nothing to a reader
    "index", "module", "moduleauthor", "sectionauthor", "codeauthor", "highlight", "highlightlang", "currentmodule",
    "toctree", "tabularcolumns", "testsetup", "testcleanup", "include", "literalinclude", "image", "figure", "raw",
    "only", "contents", "program", "audit-event-table", "default-role", "XXX", "comment", "csv-table",
}  # fmt: skip
_SPOKEN = {
    "note": "Note:", "warning": "Warning:", "seealso": "See also:", "versionadded": "New in version",
    "versionchanged": "Changed in version", "deprecated": "Deprecated since version", "impl-detail": "Note:",
    "deprecated-removed": "Deprecated since version", "availability": "Availability:", "rubric": "", "glossary": "",
}  # fmt: skip
_DIRECTIVE = re.compile(r"( *)\.\. ([\w:-]+):: ?(.*)")
_UNDERLINE = re.compile(r"([=\-~^\"'*+#.])\1{2,}\s*$")
_RULE = re.compile(r"\s*(\+[-=+]+\+|[=\-]{2,}( +[=\-]{2,})*)\s*$")
_OPTION = re.compile(r"\s*:[\w -]+:( |$)")


@dataclass(frozen=True, slots=True)
class Document:
    """One source file: `raw` as it was, `prose` as it is trained on."""

    name: str
    raw: str
    prose: str


def read_documents(folder: Path) -> list[Document]:
    """Every `.rst`, `.rst.txt` and `.txt` file below `folder`, by name; plain text passes unchanged."""
    documents = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in {".rst", ".txt"} and p.is_file()):
        raw = path.read_text(encoding="utf-8", errors="ignore")
        prose = clean_rst(raw) if ".rst" in path.suffixes else raw
        if len(prose) > 200:
            documents.append(Document(str(path.relative_to(folder)), raw, prose))
    if not documents:
        raise FileNotFoundError(f"no .rst or .txt files below {folder}")
    return documents


def is_held_out(document: Document) -> bool:
    """Whether the file is kept for evaluation: decided by its name, so that every run agrees."""
    return hashlib.sha256(document.name.encode()).digest()[0] % HELD_OUT_SHARE == 0


def clean_rst(raw: str) -> str:
    """The text without its markup: headings as `#`, roles as their words, paragraphs on one line."""
    return _unwrap(_inline("\n".join(_blocks(raw.expandtabs(4).split("\n")))))


def _blocks(lines: list[str]) -> list[str]:
    out: list[str] = []
    marks: list[str] = []
    skip_deeper_than: int | None = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if skip_deeper_than is not None:
            if not line.strip() or indent > skip_deeper_than:
                continue
            skip_deeper_than = None
        if match := _DIRECTIVE.match(line):
            spoken = _directive(match[2], match[3])
            if spoken is None:
                skip_deeper_than = indent
            elif spoken:
                out.append(match[1] + spoken)
        elif line.lstrip().startswith(".. ") or line.strip() == "..":
            skip_deeper_than = indent  # a comment, a label or a footnote
        elif _UNDERLINE.match(line) and out and out[-1].strip() and len(line.strip()) >= len(out[-1].strip()) - 2:
            if line[0] not in marks:
                marks.append(line[0])
            out[-1] = "#" * min(3, 1 + marks.index(line[0])) + " " + out[-1].strip()
        elif not _RULE.match(line) and not _UNDERLINE.match(line) and not _OPTION.match(line):
            out.append(line.rstrip())
    return out


def _directive(name: str, argument: str) -> str | None:
    """What a reader sees of a directive's first line; None when its block is dropped, "" when only the line is."""
    if name in _SILENT:
        return None
    if name in _SPOKEN:
        return f"{_SPOKEN[name]} {argument}".strip() + {"versionadded": ".", "versionchanged": ":"}.get(name, "")
    if name in {"code-block", "doctest", "productionlist", "testcode", "testoutput", "parsed-literal", "math"}:
        return ""
    return argument


def _inline(text: str) -> str:
    text = re.sub(r":(pep|rfc):`(\d+)`", lambda m: f"{m[1].upper()} {m[2]}", text)
    text = re.sub(r":[\w:+.-]+:`([^`<]+?)\s*<[^`>]*>`", r"\1", text)
    text = re.sub(r":[\w:+.-]+:`[~!.]*([^`]+)`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"`([^`]+)`__?", r"\1", text)
    text = re.sub(r"\*\*(\w[^*\n]*)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*(])\*(\w[\w .-]*)\*(?!\w)", r"\1", text)
    text = re.sub(r" ?\[#?\w*\]_", "", text)
    text = re.sub(r"::[ ]*$", ":", text, flags=re.MULTILINE)
    return text.replace("\\ ", "").replace("\\*", "*").replace("|version|", "3")


def _unwrap(text: str) -> str:
    """Joins the lines of a wrapped paragraph; a line that is short, code or a list item keeps its break."""
    out: list[str] = []
    last = ""  # the last source line: whether it was full decides, not how long the joined one is
    for line in text.split("\n"):
        wrapped = len(last) > 55 or last.lstrip().startswith(("Changed in", "Deprecated since"))
        full = wrapped and not last.lstrip().startswith((">>>", "...", "#"))
        continues = re.match(r"\s*[A-Za-z(`\"]", line) and not re.search(r"[{;=]\s*$|^\s*(def|class|if|for|return) ", line)
        if out and full and continues and abs(_indent(line) - _indent(last)) <= 3 and line.strip():
            out[-1] += " " + line.strip()
        else:
            out.append(line)
        last = line
    joined = re.sub(r"(?<=[a-z)`][.,:;?!]) {2}(?=[A-Z`(])", " ", "\n".join(out))
    return re.sub(r"\n{3,}", "\n\n", joined).strip() + "\n"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
