"""`python -m gpmetric`."""

from gpmetric.cli import main

if __name__ == "__main__":
    main()
