"""``python -m snv2_bench``: the command line without its entry point."""

from snv2_bench.cli import main

if __name__ == "__main__":
    main()
