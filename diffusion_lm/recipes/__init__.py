"""Floor 5: stages, comparisons of arms, and the report that shows them."""
