"""Explanations of features by a language model: what a feature is, how complex, and whether the explanation holds."""
