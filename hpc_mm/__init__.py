"""hpc_mm: from a list of URLs to a table of benchmark scores on a Slurm cluster."""

__version__ = "0.1.0"
