"""torchvision's operators by name only: its wheel is CUDA's, and its code will not load beside a
torch for CPU, which leaves its own registrations without what they are for."""

from torch.library import Library

DECLARED = Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    DECLARED.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
