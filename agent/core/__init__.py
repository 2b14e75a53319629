"""The daemon: the one place that builds the parts, wires them, starts and stops them."""
