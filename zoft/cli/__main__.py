"""Run `zoft` as a module: torchrun -m zoft.cli."""

from zoft.cli.main import main

if __name__ == "__main__":
    main()
