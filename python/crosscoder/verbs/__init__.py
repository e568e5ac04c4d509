"""The verbs of the command line, one module each: a configuration, an example and `run`."""
