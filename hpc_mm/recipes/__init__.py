"""Which values: one run per file, a function of the same name that returns a whole Run."""
