"""The nouns of the house: requests, block keys, events, commands, errors, units. Pure."""
