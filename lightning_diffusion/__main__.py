"""`python -m lightning_diffusion` is `lightning-diffusion`."""

import sys

from lightning_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
