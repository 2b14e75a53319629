"""Bundles: manifest + variants + golden set, as a directory, a ``.edgemodel`` file or a bare model file."""
