"""How the model of examples/probe was made: its corpus, its tasks, its training and what it can do."""
