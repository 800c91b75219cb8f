"""Facts stated in one place and asked for in another: how the model learns to recall what stands far back."""

import random
from dataclasses import dataclass

LABELS = (
    "pass key", "passkey", "password", "secret code", "access code", "magic number", "secret number", "key",
    "door code", "PIN", "lucky number", "account number", "code word", "secret word", "ticket number", "order number",
)  # fmt: skip
OWNERS = (
    "Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Liam", "Maria",
    "Nora", "Oscar", "Paula", "server", "station", "bank", "library", "ship", "red box", "blue box", "garden",
)  # fmt: skip
_STATEMENTS = (
    "{The} is {value}. Remember it.",
    "{The} is {value}. Remember it. {value} is {the}.",
    "{The} is {value}.",
    "Remember this: {the} is {value}.",
    "There is an important fact hidden in this text: {the} is {value}. Do not forget it.",
    "Please note that {the} is {value}.",
    "Important: {the} is {value}. I will ask you about it later.",
)
_PLAIN_QUESTIONS = (
    ("What is {the}? {The} is", " {value}."),
    ("What is {the}? {The} is", " {value}."),
    ("Now, what is {the}? {The} is", " {value}."),
    ("As stated above, {the} is", " {value}."),
    ("{The} is", " {value}."),
    ("Question: What is {the}?\nAnswer:", " {value}."),
)
CHAT_QUESTIONS = (
    "What is {the}?", "What is {the}?", "What was {the}?", "Tell me {the}.", "Do you remember {the}?",
    "I forgot {the}. What is it?", "Please repeat {the}.", "Can you tell me {the}?", "Now, what is {the}?",
)  # fmt: skip
REMEMBERED = ("OK, I will remember it.", "I will remember that.", "Noted. I will remember it.")


@dataclass(frozen=True, slots=True)
class Fact:
    """A value under a name such as "the pass key" or "my name"; `yours` is the name in a reply."""

    the: str
    value: str
    yours: str

    def fill(self, pattern: str) -> str:
        """The pattern with {the}, {The} and {value} in place."""
        return pattern.format(the=self.the, The=self.the[0].upper() + self.the[1:], value=self.value)

    def statement(self, rng: random.Random) -> str:
        """One of several ways to state the fact."""
        return self.fill(rng.choice(_STATEMENTS))

    def plain_question(self, rng: random.Random) -> tuple[str, str]:
        """A question in running text, and its answer as it continues."""
        question, answer = rng.choice(_PLAIN_QUESTIONS)
        return self.fill(question), self.fill(answer)

    def chat_question(self, rng: random.Random) -> tuple[str, str]:
        """A question of a user, and the assistant's answer."""
        return self.fill(rng.choice(CHAT_QUESTIONS)), f"{self.yours[0].upper()}{self.yours[1:]} is {self.value}."


def random_facts(rng: random.Random, count: int) -> list[Fact]:
    """`count` facts with names all different; most values are numbers of four to eight digits."""
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        label = "pass key" if rng.random() < 0.3 else rng.choice(LABELS)
        owner = rng.choice(OWNERS)
        the = rng.choice(
            (f"the {label}", f"the {label}", f"the {label} of {_article(owner)}", f"the {label} for {_article(owner)}")
        )
        facts.setdefault(the, Fact(the, _value(rng, label), the))
    return list(facts.values())


def personal_fact(rng: random.Random) -> Fact:
    """What a user says of themselves, with a made-up word or a name for its value."""
    what = rng.choice(("name", "name", "dog's name", "favourite colour", "home town", "favourite book"))
    value = rng.choice(OWNERS) if rng.random() < 0.3 else _syllables(rng)
    return Fact(f"my {what}", value.capitalize(), f"your {what}")


def _article(owner: str) -> str:
    return owner if owner[0].isupper() else f"the {owner}"


def _value(rng: random.Random, label: str) -> str:
    if "word" in label and rng.random() < 0.7:
        return _syllables(rng)
    digits = 5 if rng.random() < 0.5 else rng.randint(3, 8)
    return "".join(rng.choice("0123456789") for _ in range(digits))


def _syllables(rng: random.Random) -> str:
    return "".join(rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))
