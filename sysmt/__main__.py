"""`python -m sysmt` is the same as `sysmt`."""

from sysmt.cli import main

if __name__ == "__main__":
    main()
