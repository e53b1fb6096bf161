"""SeqIO tasks; each module registers its own when it is imported. The package itself imports nothing."""
