"""Progressive ADMM: pruning and quantizing LeNet-5 at the published rates and beyond."""
