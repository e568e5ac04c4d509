"""Gradients of the pairs -> gradients of the weights."""
