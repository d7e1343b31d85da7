"""``python -m lowmem_rlhf``: the same command line as ``lowmem-rlhf``."""

from lowmem_rlhf.cli import main

if __name__ == "__main__":
    main()
