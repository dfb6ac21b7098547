"""Kernel Quantization (arXiv 2003.05148): experiments on CIFAR-100."""
