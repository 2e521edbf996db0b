"""The few hot operations of the networks, behind one table.

`reference` holds the definition of each operation in plain torch; it runs on any device and is the oracle for every
faster path. `backend` is the interface of faster paths, `registry` chooses among them, `elementwise` has the small
operations. Knows tensors, not models.
"""
