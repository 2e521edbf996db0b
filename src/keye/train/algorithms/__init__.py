"""Training algorithms: one class each, which turns samples into weights of the loss terms (`keye.train.losses`)."""
