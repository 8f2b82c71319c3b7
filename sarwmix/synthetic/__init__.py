"""Generated data in the layouts of real ones."""
