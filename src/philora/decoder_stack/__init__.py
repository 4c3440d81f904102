"""Compute the decoder layers of the Phi-3 family on a GPU: one autograd node per layer, for packed batches with LoRA.

`model` asks `choice` how a batch is computed, by the facts of `facts`. `stack` holds the layers (`layer`) with their
kernels (`row_kernels`) and products (`products`).
"""
