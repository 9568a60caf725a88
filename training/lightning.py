"""The one place that imports PyTorch Lightning: with a torchvision that imports, and quietly.

Every other module takes Lightning's names from here, so that the order of imports cannot matter.
"""

from __future__ import annotations

import logging
import warnings

from training.torchvision_cpu import ensure_importable

ensure_importable()

# Raised inside Lightning (2.6) by its own use of torch, nothing a user can act on.
warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
# Workers would copy batches between processes; ours are rows of tensors in memory.
warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
# A data module without a validation set returns no loader, as Lightning's documentation has it.
warnings.filterwarnings("ignore", message=r".*Total length of `list` across ranks is zero.*")

from pytorch_lightning import (  # noqa: E402
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from pytorch_lightning.callbacks import (  # noqa: E402
    Checkpoint,
    ModelCheckpoint,
    RichProgressBar,
)
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger  # noqa: E402
from pytorch_lightning.plugins.environments import LightningEnvironment  # noqa: E402
from pytorch_lightning.plugins.io import TorchCheckpointIO  # noqa: E402
from pytorch_lightning.utilities import rank_zero_only  # noqa: E402

# Lightning's INFO lines announce accelerators that are absent and products; what a run uses is in
# the scripts' own first line.
for _name in ("pytorch_lightning", "lightning_fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)

__all__ = [
    "CSVLogger",
    "Callback",
    "Checkpoint",
    "LightningDataModule",
    "LightningEnvironment",
    "LightningModule",
    "Logger",
    "ModelCheckpoint",
    "RichProgressBar",
    "TensorBoardLogger",
    "TorchCheckpointIO",
    "Trainer",
    "rank_zero_only",
    "seed_everything",
]
