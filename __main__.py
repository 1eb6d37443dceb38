"""python -m tileweld: the command line, where the console script is not on PATH."""

from tileweld.compiler.cli import main

if __name__ == "__main__":
    main()
