"""Layer 5: training stages, comparisons of arms, and the report."""
