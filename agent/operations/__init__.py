"""What the agent does on command: install, choose, activate, remove, maintain. Blocking: run in a worker thread."""
