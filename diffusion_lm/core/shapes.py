"""The legend of dimension letters. Names end in their shape where that helps the reader: `logits_BTV`, `keys_NBTKH`.

| letter | meaning |
|---|---|
| B | batch: rows of a batch (a row is one example, or several packed ones) |
| T | length of the main stream (decoder-only: conditioning then target; encoder-decoder: the decoder's stream) |
| S | length of the encoder stream |
| Q | query slots of one forward pass: T, or 1 when one token is decoded from a cache |
| W | length of the target window that a sampler fills |
| C | candidates decoded in parallel for one prompt |
| D | model width |
| F | width of the feed-forward layer |
| H | query heads |
| K | key/value heads (K divides H) |
| E | size of one head |
| V | vocabulary, padded rows included where a name says `padded` |
| N | layers |
"""
