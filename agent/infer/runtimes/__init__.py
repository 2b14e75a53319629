"""Inference runtimes behind one port; each is imported at first use only."""
