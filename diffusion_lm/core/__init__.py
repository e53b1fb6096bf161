"""Layer 0: types, random keys, special tokens and errors that all other layers use."""
