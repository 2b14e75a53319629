"""What a device and its fleet say to each other: topics, messages, and the table of operations. Pure."""
