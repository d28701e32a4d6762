"""How many bits per pixel do held-out digits need under a checkpoint, and where should the decoder take over?

    python benchmarks/digits_likelihood.py runs/digits-1/checkpoints/last.ckpt [--ends 5 default 10]

The bound of Kingma et al. 2021 with its three terms, of the averaged weights, on the 266 held-out digits with their 17
grey levels, over log-SNR from -10 to each of the ends. Without any model they need log2 17 = 4.087 bits.
"""

from __future__ import annotations

import argparse

from lightning_diffusion import DiffusionModule, DiscreteDecoder, module_likelihood_bound
from lightning_diffusion.datamodules import DigitsDataModule


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--ends", nargs="*", default=["5", "default", "10"])
    given = parser.parse_args()
    module = DiffusionModule.load_from_checkpoint(given.checkpoint, map_location="cpu")
    images = DigitsDataModule().val_dataloader()
    for end in given.ends:
        ends = (-10.0, None if end == "default" else float(end))
        bound = module_likelihood_bound(
            module, images, DiscreteDecoder(num_values=17), log_snr_range=ends, weights="ema"
        )
        terms = (f"{name} {bits:.3f} +- {spread:.3f}" for name, (bits, spread) in bound._asdict().items())
        print(f"up to {end:>7}:", ", ".join(terms), flush=True)


if __name__ == "__main__":
    main()
