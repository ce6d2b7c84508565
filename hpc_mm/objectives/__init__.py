"""What is minimised: one per file, (model, batch) -> loss and metrics."""
