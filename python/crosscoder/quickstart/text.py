"""Where reading texts was before `crosscoder.activations.text`; scripts may still import it from here."""

from crosscoder.activations.text import load_documents

__all__ = ["load_documents"]
