"""The prompts of the built-in tasks: one module a task, and the words that they are made of."""
