"""Position-based scaled gradient: the paper's experiments."""
