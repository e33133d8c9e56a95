"""`python -m zoft` is `zoft`."""

from zoft.cli.main import main

if __name__ == "__main__":
    main()
