"""Training: configuration, batches, optimiser, stages and the loop that joins them."""
