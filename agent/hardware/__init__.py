"""What this device can do: facts read from files, profiles of board families, sensors."""
