"""Floor 4: from tasks to batches. Only `seqio_source` needs TensorFlow, and only `materialise` imports it."""
