"""Live video, indexed video, answers and evidence."""
