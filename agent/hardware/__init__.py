"""What this device can do: facts read from files, profiles of board families, sensors.

Import the modules themselves (``agent.hardware.probe`` and so on). Nothing here imports pydantic, numpy or a runtime:
detection has to stay cheap enough to run before anything else, on the smallest board.
"""
