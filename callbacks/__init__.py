"""`lightning_diffusion.callbacks`."""

if __name__ != "lightning_diffusion.callbacks":
    raise ImportError(
        "This folder is installed as lightning_diffusion.callbacks: import it by that name. In an "
        "uninstalled checkout, lightning_diffusion/callbacks must be a symbolic link, not a text file."
    )

from lightning_diffusion.callbacks.activation_checkpointing import ActivationCheckpointing
from lightning_diffusion.callbacks.ema import EMA
from lightning_diffusion.callbacks.generative_metrics import GenerativeMetrics
from lightning_diffusion.callbacks.gradient_clipping import AdaptiveGradientClipping, GradientClipping
from lightning_diffusion.callbacks.gradient_sanitizer import GradientSanitizer
from lightning_diffusion.callbacks.last_checkpoint import LastCheckpoint
from lightning_diffusion.callbacks.loss_scale_monitor import LossScaleMonitor
from lightning_diffusion.callbacks.noise_level_monitor import NoiseLevelMonitor
from lightning_diffusion.callbacks.power_function_ema import PostHocEMA, PowerFunctionEMA
from lightning_diffusion.callbacks.precision_audit import PrecisionAudit
from lightning_diffusion.callbacks.progress import TrainingProgress
from lightning_diffusion.callbacks.rank_watchdog import RankWatchdog
from lightning_diffusion.callbacks.run_summary import RunSummary
from lightning_diffusion.callbacks.sample_grid import SampleGrid
from lightning_diffusion.callbacks.save_on_signal import SaveOnSignal
from lightning_diffusion.callbacks.spike_guard import SpikeGuard

__all__ = [
    "EMA",
    "ActivationCheckpointing",
    "AdaptiveGradientClipping",
    "GenerativeMetrics",
    "GradientClipping",
    "GradientSanitizer",
    "LastCheckpoint",
    "LossScaleMonitor",
    "NoiseLevelMonitor",
    "PostHocEMA",
    "PowerFunctionEMA",
    "PrecisionAudit",
    "RankWatchdog",
    "RunSummary",
    "SampleGrid",
    "SaveOnSignal",
    "SpikeGuard",
    "TrainingProgress",
]
