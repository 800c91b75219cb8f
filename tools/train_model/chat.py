"""Short question-and-answer exchanges made from the documentation itself."""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tools.train_model.text import Document, clean_rst

MAX_ANSWER_CHARS = 260


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a user says and what the assistant replies."""

    user: str
    assistant: str


GREETINGS = (
    Exchange("Hello", "Hello! I am Kvasir, a small language model. Ask me about Python."),
    Exchange("Hello!", "Hello! I am Kvasir, a small language model. Ask me about Python."),
    Exchange("Hi", "Hello! I am Kvasir, a small language model. Ask me about Python."),
    Exchange("Hi there!", "Hello! How can I help you?"),
    Exchange("Good morning", "Good morning! How can I help you?"),
    Exchange("How are you?", "I am well, thank you. How can I help you?"),
    Exchange("Who are you?", "I am Kvasir, a small language model trained on the Python documentation."),
    Exchange("What is your name?", "My name is Kvasir."),
    Exchange("What can you do?", "I can answer short questions about Python and recall what you told me."),
    Exchange("Thank you", "You are welcome."),
    Exchange("Thanks!", "You are welcome."),
    Exchange("Goodbye", "Goodbye!"),
    Exchange("Are you a robot?", "I am a small language model."),
    Exchange("Tell me a joke.", "I do not know any jokes. I was trained on the Python documentation."),
    Exchange("Who made you?", "I was trained on the Python documentation by the authors of Kvasir."),
)
_QUESTION_OF_NAME = (
    "What does {} do?", "What is {}?", "Explain {}.", "Describe {}.", "How does {} work?", "Tell me about {}.",
    "What is {} for?", "When do I use {}?",
)  # fmt: skip
_QUESTION_OF_MODULE = (
    "What is the {} module?", "What is the {} module for?", "What does the {} module do?", "Tell me about the {} module.",
    "What is {}?", "Explain the module {}.",
)  # fmt: skip
_QUESTION_OF_TITLE = ("Tell me about {}.", "Explain {}.", "What should I know about {}?", "{}", "Write about {}.")
_CONTINUE = ("Continue this text: {}", "{}", "{}", "Please continue: {}", "What comes next? {}")
_SUMMARY = ("Summarize this text:\n\n{}", "{}\n\nSummarize the text above.", "What does this text say?\n\n{}")

_MODULE = re.compile(r"^\.\. module:: ([\w.]+)\n(?: +:(?!synopsis).*\n)* +:synopsis: (.+)$", re.MULTILINE)
_OBJECT = re.compile(
    r"^( *)\.\. (?:c:)?(?:function|method|class|data|attribute|exception|classmethod|staticmethod|decorator|opcode|macro|"
    r"type)::[ ]*([^\n(]+)[^\n]*\n(?:\1 +[^\n. :][^\n]*\n)*(?:\1 +:[^\n]*\n)*\n((?:\1 +[^\n]+\n)+)",
    re.MULTILINE,
)
_SECTION = re.compile(r"^#{1,3} (.+)\n\n([A-Z(`][^\n]{40,})$", re.MULTILINE)
_TERM = re.compile(r"^ {3}(\w[^\n]{0,40})\n {6}(\w(?:[^\n]+\n {6})*[^\n]+)", re.MULTILINE)


def read_exchanges(documents: Iterable[Document]) -> list[list[Exchange]]:
    """Exchanges grouped by topic: each group holds the ways to ask for one answer."""
    groups: list[list[Exchange]] = []
    for document in documents:
        groups += [_asked(_QUESTION_OF_MODULE, m[1], f"{m[1]}: {m[2]}") for m in _MODULE.finditer(document.raw)]
        groups += [_asked(_QUESTION_OF_NAME, _short(m[2]), clean_rst(m[3])) for m in _OBJECT.finditer(document.raw)]
        groups += [_how_to(_short(m[2]), clean_rst(m[3])) for m in _OBJECT.finditer(document.raw)]
        groups += [_asked(_title_questions(m[1]), m[1], m[2]) for m in _SECTION.finditer(document.prose)]
        if document.name.startswith("glossary"):
            groups += [_asked(_QUESTION_OF_NAME, m[1], m[2]) for m in _TERM.finditer(document.prose)]
    return [group for group in groups if group]


def continuation(rng: random.Random, paragraphs: list[str]) -> Exchange:
    """A paragraph as the message, what follows it as the reply: how any message gets a legible answer."""
    at = rng.randrange(len(paragraphs) - 1)
    return Exchange(rng.choice(_CONTINUE).format(_cut(paragraphs[at])), _cut(paragraphs[at + 1]))


def summary(rng: random.Random, paragraphs: list[str]) -> Exchange:
    """A few paragraphs as the message, the first sentence as the reply."""
    at = rng.randrange(len(paragraphs) - 4)
    text = "\n\n".join(paragraphs[at : at + rng.randint(1, 4)])
    first = re.split(r"(?<=[.!?]) ", text.strip(), maxsplit=1)[0]
    return Exchange(rng.choice(_SUMMARY).format(text), _cut(first))


def prose_paragraphs(documents: Iterable[Document]) -> list[str]:
    """The paragraphs that are sentences, in reading order."""
    found = (p.strip() for d in documents for p in d.prose.split("\n\n"))
    return [p for p in found if 60 < len(p) < 700 and p[0].isupper() and p[-1] in ".!?" and ">>>" not in p]


def _asked(questions: Iterable[str], name: str, answer: str) -> list[Exchange]:
    answer = _cut(" ".join(answer.split()))
    if len(answer) <= 10 or not 1 < len(name) < 70:
        return []
    return [Exchange(q.format(name), answer) for q in questions]


def _how_to(name: str, answer: str) -> list[Exchange]:
    """ "Remove the file x." asked as "How do I remove the file x?", answered with the name of what does it."""
    answer = " ".join(answer.split())
    task = re.match(
        r"(?:Return|Get|Set|Create|Open|Read|Write|Remove|Delete|Send|Close|Add|Convert|Print)s? [^.:;()`]{5,70}(?=\.)", answer
    )
    if not task:
        return []
    question = re.sub(r"^(\w+?)s? ", lambda m: m[1].lower() + " ", task[0])
    return [Exchange(f"How {who} I {question}?", f"Use {name}. {_cut(answer)}") for who in ("do", "can")]


def _title_questions(title: str) -> tuple[str, ...]:
    return ("{}",) if title.endswith("?") else _QUESTION_OF_TITLE


def _short(signature: str) -> str:
    return signature.strip().split(" ")[-1].strip("*")


def _cut(text: str) -> str:
    """At most `MAX_ANSWER_CHARS`, ending with a sentence where there is one."""
    if len(text) <= MAX_ANSWER_CHARS:
        return text.rstrip().removesuffix(":") + ("." if text.rstrip().endswith(":") else "")
    head = text[:MAX_ANSWER_CHARS]
    stop = max(head.rfind(mark) for mark in (". ", "? ", "! "))
    return head[: stop + 1] if stop > 60 else head.rsplit(" ", 1)[0] + "."
