"""The run directory: what a run leaves on disk, and the rules for starting, resuming and reading one."""
