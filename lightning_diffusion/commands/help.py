"""The help of fit and its relatives on one page each; every option named here is checked to exist."""

_FIT = """\
usage: lightning-diffusion fit --config FILE [--KEY VALUE ...]
       lightning-diffusion fit --resume RUN [--KEY VALUE ...]

Train a diffusion model. Keys are those of the YAML file, joined by dots; the command line wins over the file.

run
  --config FILE                  YAML; several are merged, later ones win
  --resume RUN_OR_CHECKPOINT     go on exactly where a run stopped, with its own configuration
  --name NAME                    the run's folder is RUNS/NAME-1, -2, ...; NAME is the config's by default
  --runs FOLDER                  runs by default
  --seed_everything INT          of all random numbers

data
  --data CLASS                   DigitsDataModule, ImageFolderDataModule, LatentsDataModule,
                                 StreamingDataModule, GaussianMixtureDataModule
  --data.folder PATH             images for ImageFolderDataModule, a sub-folder per class
  --data.batch_size INT          images per process and micro-batch
  --data.image_size INT          pixels

model
  --model.network CLASS          UNet, MagnitudePreservingUNet, DiT, or the path of your own nn.Module
  --model.network.channels INT   any argument of the network
  --model.objective CLASS        EDM, DDPM, VPrediction, DiffusionObjective
  --model.objective.density.mean FLOAT
                                 any argument of the objective or of its parts
  --model.representation CLASS   Identity, Standardize, LatentRepresentation
  --model.sampler CLASS          Heun, DPMSolver2M, Euler, DDIM, Ancestral
  --model.optimizer CLASS        any of torch.optim; AdamW by default
  --model.optimizer.lr FLOAT     any of its arguments
  --model.learning_rate CLASS    WarmupConstant, WarmupCosine, WarmupLinear, WarmupInverseSquareRoot
  --model.label_dropout FLOAT    share of labels left out, for classifier-free guidance

trainer
  --trainer.max_steps INT        optimizer steps
  --trainer.max_epochs INT       passes through the data
  --trainer.max_time DD:HH:MM:SS
  --trainer.accelerator NAME     auto by default: a GPU where there is one
  --trainer.devices N
  --trainer.strategy NAME
  --trainer.precision NAME       32-true, bf16-mixed, 16-mixed
  --trainer.accumulate_grad_batches N
  --trainer.log_every_n_steps N
  --trainer.check_val_every_n_epoch N
  --trainer.fast_dev_run BOOL    one batch of everything, to see that it runs; nothing is written
  --trainer.callbacks+=CLASS     SampleGrid, PowerFunctionEMA, EMA, ...
  --trainer.callbacks.ARGUMENT VALUE
                                 of the callback just added

  --print_config                 the whole configuration, resolved, as YAML; and stop
  --model.network.help CLASS     the arguments of a class, here for the network
  --help-all                     every option

Results are in the run's folder: config.yaml, metrics.csv, checkpoints/last.ckpt, samples/. Ctrl-C and SIGTERM save
a checkpoint and end with status 130 and 143."""


def _other(command: str, what: str, more: str = "") -> str:
    return f"""\
usage: lightning-diffusion {command} --checkpoint RUN_OR_CHECKPOINT [--KEY VALUE ...]

{what}

  --checkpoint RUN_OR_CHECKPOINT of a run folder the last one; its configuration is used
  --config FILE                  YAML, over that of the run
  --data CLASS                   other data
  --data.batch_size INT
  --trainer.accelerator NAME
  --trainer.precision NAME
{more}  --help-all                     every option"""


_OUT = "  --out FILE                     .npz, .png or a folder, predictions.npz by default\n"

PAGES = {
    "fit": _FIT,
    "validate": _other("validate", "The loss on held-out data, at the same noise in every run."),
    "test": _other("test", "The loss on the test data, at the same noise in every run."),
    "predict": _other("predict", "Samples for the conditions of the prediction data.", _OUT),
}
