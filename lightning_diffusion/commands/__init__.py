"""The commands, by name; each module's `run(name, arguments)` returns the exit status."""

COMMANDS = {
    "fit": "lightning_diffusion.commands.train",
    "validate": "lightning_diffusion.commands.train",
    "test": "lightning_diffusion.commands.train",
    "predict": "lightning_diffusion.commands.train",
    "sample": "lightning_diffusion.commands.sample",
    "evaluate": "lightning_diffusion.commands.evaluate",
    "export": "lightning_diffusion.commands.export",
    "ema": "lightning_diffusion.commands.ema",
    "prepare": "lightning_diffusion.commands.prepare",
    "doctor": "lightning_diffusion.commands.doctor",
}

HELP = """\
usage: lightning-diffusion COMMAND [OPTIONS]

Train diffusion models and draw from them.

  fit        train:           lightning-diffusion fit --config configs/digits.yaml
  validate   held-out loss:   lightning-diffusion validate --checkpoint runs/digits-1
  test       the same, on the test data
  predict    samples for the conditions of the prediction data
  sample     draw images:     lightning-diffusion sample --checkpoint runs/digits-1 --num 64 --out samples.png
  evaluate   figures of merit, for several weights, samplers, guidances: lightning-diffusion evaluate --checkpoint RUN
  export     for other programs: lightning-diffusion export --checkpoint RUN --to safetensors --out model.safetensors
  ema        averages of any width after training: lightning-diffusion ema sweep runs/digits-1
  prepare    images or latents in chunks, to stream: lightning-diffusion prepare FOLDER OUT --image-size N
  doctor     what is wrong with a configuration, before it is trained: lightning-diffusion doctor --config FILE

COMMAND --help tells its options, --version the version."""
