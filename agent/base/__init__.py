"""Ground floor: errors, files, configuration, clock, systemd. Imports nothing of the agent."""
