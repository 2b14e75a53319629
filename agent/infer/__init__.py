"""Running models: tensors, runtimes, trial children, the engine."""
