"""Mirror descent: the paper's experiments."""
