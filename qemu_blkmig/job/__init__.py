"""One migration as a job: planned, carried out, settled whatever happens."""
