"""`keye eval`: benchmarks, results and comparisons; one module for each verb."""
