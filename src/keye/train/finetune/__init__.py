"""Fine-tuning for people: settings under the names that they type, a check before a run, samples before and after."""
