"""For the serving tests' environment alone: torchvision from the package index is linked to CUDA's torch, and beside a
CPU torch its compiled operators are missing, so that it cannot even be imported. Nothing there calls them; it is
enough that they are declared. `make_environment.sh` has every process of that environment import this module first."""

import sys
from importlib.abc import MetaPathFinder


OPERATORS = ("nms", "qnms")


class DeclareOperators(MetaPathFinder):
    """Declares the operators when torchvision is about to be imported, since torch must be there by then."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            from torch.library import Library

            self.declared = Library("torchvision", "DEF")
            for operator in OPERATORS:
                self.declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


FINDER = DeclareOperators()  # kept, since the operators go when their library does
sys.meta_path.insert(0, FINDER)
