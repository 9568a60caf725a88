"""Make `import torchvision` work beside a torch that it was not built for.

PyPI's torchvision is built against a CUDA torch. Beside a CPU torch its compiled library does not
load; that alone would be harmless, but the import then describes operators that were never
declared and stops at `operator torchvision::nms does not exist`. Lightning imports torchvision
through torchmetrics, so nothing starts. We use its MNIST readers only, no compiled operator:
declaring the schemas is enough.
"""

from __future__ import annotations

import importlib
import sys

import torch

# As in torchvision/csrc/ops; those that `import torchvision` describes without looking first.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library's declarations end with the object


def ensure_importable() -> None:
    """Import torchvision, declaring its missing operators if need be.

    Do nothing where torchvision imports well or is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left half-made
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
        importlib.import_module("torchvision")
