"""Every tolerance of the tests, with its reason."""

# fp32 forward of one adapted model against another that does the same sums in another order: a few ulp (2^-24) grown
# over the layers. Relative to the largest logit.
LOGITS_FP32 = 1e-5

# bf16 forward against the same sums in another order: one rounding (2^-9) of each of some ten results in a row.
# Relative to the norm of a token's logits.
LOGITS_BF16 = 2e-2

# fp32 loss of a training step against PEFT + TRL: the sums of forward and backward run in another order, AdamW divides
# by the square root of small second moments in the first steps, and 20 steps add up.
LOSS_STEP_FP32 = 1e-4

# bf16 loss of a training step: bf16 keeps 8 bits, so a logit of 10 moves by 0.04; over a batch of some hundred labels
# the mean moves by about 0.04 / sqrt(100), and 20 steps of AdamW add up.
LOSS_STEP_BF16 = 2e-2

# fp32 gradient of an adapter's matrix with the fast paths against the one without: the same sums in another order,
# forward and back through two layers. Relative to the gradient's norm.
GRADIENTS_FP32 = 1e-5

# fp32 loss of packed rows against the same rows alone: the same sums in attention kernels of another shape.
PACKED_FP32 = 1e-5

# fp32 gradients over a quantised base against those over its dequantised weights: the same sums in another order, and
# the norm of a small gradient is reached through larger terms.
QUANTIZED_FP32 = 1e-4

# bf16 logits of a merged model against those of base and adapter: one more rounding (2^-9) of each weight.
MERGED_BF16 = 5e-2
