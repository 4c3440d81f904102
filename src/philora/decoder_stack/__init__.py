"""Compute the decoder layers of the Phi-3 family on a GPU: one autograd node per layer, for packed batches with LoRA.

| module           | holds                                                                                |
| ---------------- | ------------------------------------------------------------------------------------ |
| `choice.py`      | how a batch is computed, and why: one function of facts                              |
| `facts.py`       | those facts, read from a model, a call and a device                                  |
| `model.py`       | `Phi3Model` with the stack, its settings, the state of dropout                       |
| `stack.py`       | all layers of a model; working copies of the adapters                                |
| `layer.py`       | one layer: forward, backward, what is kept                                           |
| `row_kernels.py` | the Triton kernels                                                                   |
| `products.py`    | the base's products: in its dtype, dequantised, in fp8                               |
| `host_inputs.py` | inputs of layers in host memory                                                      |
| `graphs.py`      | the stack in CUDA graphs, for short rows                                             |
| `rows.py`        | data types that kernels and products share                                           |
| `trial.py`       | the comparison with plain PEFT before the first use on a machine                     |
"""
