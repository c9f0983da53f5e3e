"""A vision tower as fast as the GPU allows, from the modules that transformers loaded.

``fast_tower`` looks at what the modules are, never at the model's name: blocks of norm, fused qkv, projection and a
plain or gated MLP, with windows or without. It takes the weights over after the checkpoint is wholly loaded, so which
files load never depends on it.
"""

from epdctl.engine.fast.parts import Unsupported
from epdctl.engine.fast.tower import FastTower, Features, fast_tower

__all__ = ["FastTower", "Features", "Unsupported", "fast_tower"]
