"""Work on more than one process or machine: batches, replicas, decoding."""
