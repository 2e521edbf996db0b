"""What the verbs share: options, inputs, outputs, and how results look on a terminal."""
