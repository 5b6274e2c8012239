"""What `norm_linear`, `linear_act` and `linear_residual` share: a product and all around it.

    activation.py   activations and their derivatives, in PyTorch and on a tile in registers
    forward.py      one kernel: norm in the prologue; bias, activation or residual in the epilogue
    persistent.py   the same product, and that of the input's gradient, on Hopper
    backward.py     gradient of the input, gradient of the weight, and what is left to do after both
    launch.py       launch configs with their reasons, and the launchers
    portable.py     the same steps in ATen calls

An op is a choice of prologue and epilogue, so its file has no kernel of its own: the formula, the
reference, samples, costs and autograd are there.
"""
