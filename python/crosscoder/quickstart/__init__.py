"""The quickstart's own stages: text, tokenizer and a small language model with snapshots."""
