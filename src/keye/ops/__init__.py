"""The few hot operations of the networks, behind one table.

`reference` holds the definition of each operation in plain torch; it runs on any device and is the oracle for every
faster path. `fused` compiles the small element-wise ones for training. Knows tensors, not models.
"""
