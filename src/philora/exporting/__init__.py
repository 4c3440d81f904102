"""Export an adapter to other layouts, and merge it into its base.

    a folder in PEFT's format ──┐                ┌── PEFT: fused, slices, or one rank and one alpha for servers
                                ├── Adapter ─────┤
    a file in loralib's format ─┘                └── loralib: lora.pt, and lora.json: how its layers are made

Reading puts the adapter on its base model, with every check of `load_adapter` or `load_lora`, and takes the updates
off the live layers. Writing puts the new files on the same base again and compares updates and logits.
"""
