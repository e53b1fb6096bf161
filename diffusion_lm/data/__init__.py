"""Layer 4: from SeqIO tasks to batches. Only `seqio_source` and `seqio_vocabulary` need TensorFlow."""
