"""``python -m snv2_kernels``: the command line without its entry point."""

from snv2_kernels.cli import main

if __name__ == "__main__":
    main()
