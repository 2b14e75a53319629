"""Who may tell this device what: signed envelopes, the keys that count, and the device's own signature."""
