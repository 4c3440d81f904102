"""The decoder layers of the Phi-3 family on a GPU: one autograd node a layer, for packed training batches under LoRA.

| module           | holds                                                                                |
| ---------------- | ------------------------------------------------------------------------------------ |
| `choice.py`      | which way a batch is computed, and why: one function of facts                        |
| `facts.py`       | those facts, read from a model, a call and a device                                  |
| `model.py`       | `Phi3Model` with the stack inside, its settings, the state of dropout                |
| `stack.py`       | all layers of a model; working copies of the adapters                                |
| `layer.py`       | one layer: forward, backward, what is kept                                           |
| `row_kernels.py` | the Triton kernels                                                                   |
| `products.py`    | the base's products: in its dtype, dequantised, in fp8                               |
| `host_inputs.py` | inputs of layers in the computer's memory                                            |
| `graphs.py`      | the stack in CUDA graphs, for short rows                                             |
| `rows.py`        | what kernels and products hand to each other                                         |
| `trial.py`       | the comparison with plain PEFT before a machine's first use                          |
"""
