"""What became of the replies: scores with intervals, comparisons, predictions of others, the report."""
