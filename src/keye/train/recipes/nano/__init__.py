"""keye-nano's training recipe: batches, helper losses, evidence and initialisation."""
