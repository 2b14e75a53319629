"""Root's part of an update of the agent: a program of its own that believes nothing that core says."""
