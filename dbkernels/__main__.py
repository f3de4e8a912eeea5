"""`python -m dbkernels`."""

from dbkernels.cli.main import main

if __name__ == "__main__":
    main()
