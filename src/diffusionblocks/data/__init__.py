"""Data sets by name or folder, split deterministically, and a stream of batches that can start anywhere."""
