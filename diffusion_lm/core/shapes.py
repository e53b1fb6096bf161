"""Dimension letters. Names of arrays may end in their shape: `logits_BTV`, `keys_NBTKH`.

| letter | meaning |
|---|---|
| B | rows of a batch (a row has one example, or several packed ones) |
| T | length of the main stream (decoder-only: conditioning then target; encoder-decoder: decoder stream) |
| S | length of the encoder stream |
| Q | query slots of one forward pass: T, or 1 in a decode step with a KV cache |
| W | length of the target window that a sampler fills |
| C | candidates decoded in parallel for one prompt |
| D | model width |
| F | width of the feed-forward layer |
| H | query heads |
| K | key/value heads (K divides H) |
| E | head dimension |
| V | vocabulary size (with padding rows if the name has `padded`) |
| N | layers |
"""
