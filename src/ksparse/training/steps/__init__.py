"""The ways to compute one update of an SAE's weights.

select       `build_step`: the step for a recipe and a device
autograd     any recipe, by torch's autograd; the other steps derive from it
explicit     TopK with AuxK, with the gradient written out
prefilter    the explicit step, with candidates from a product in low precision
native       the prefiltered step by compiled kernels, on a CPU
triton       the prefiltered step by Triton kernels, on a GPU
async_copy   reading numbers from the device without waiting for its queued work
"""
