"""What each ONNX operator computes, in torch functions, a file for each subject.

Of several spellings the one is chosen that `torch.export` captures whole (`linear`, `layer_norm`,
`scaled_dot_product_attention`), because it is the level on which the passes match.
"""

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
