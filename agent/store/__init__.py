"""The encrypted store: age v1 blobs with detached headers, device keys, catalog (see docs/spec/store.md)."""
