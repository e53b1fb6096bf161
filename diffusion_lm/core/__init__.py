"""Floor 0: the types, keys, special tokens and errors that every other floor speaks."""
