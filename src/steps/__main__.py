"""`python -m steps`, the same door as the `steps` command."""

from steps.dispatch.cli import main

if __name__ == "__main__":
    main()
