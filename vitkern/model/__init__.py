"""The network: `vit.py` puts it together, everything else here is a part of it.

config.py arguments.py presets.py    what can be asked for, and under which names
embed.py hybrid.py                   images to tokens
block.py branches.py fused.py        the block, its two branches, and both as autograd nodes
block_variants.py rel_pos.py         timm's other blocks; relative positions
layers.py tokens.py                  small parts: norms, activations, pools
weights.py surgery.py                how weights start and are resized; changing a built model
intermediates.py                     what stands between the blocks
"""

from vitkern.model.vit import ViT, create_model

__all__ = ["ViT", "create_model"]
