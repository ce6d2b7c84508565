"""Architecture: one model family per file."""
