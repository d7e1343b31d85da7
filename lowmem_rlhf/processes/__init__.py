"""Several processes that train one run: who they are, what each does of the work, and how they are started."""
