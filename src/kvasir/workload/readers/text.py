"""How many tokens a text has, where nobody counted them."""

CHARACTERS_PER_TOKEN = 4
"""English prose in the vocabularies of today's models has about four characters a token (OpenAI's rule of thumb)."""


def by_characters(text: str) -> int:
    """An estimate: a token for every four characters, at least one for any text."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)
